"""What the machine code of GPU kernels shows, read without a GPU: facts, and no prediction of a time.

    python benchmarks/gpu_static.py kernels.cubin                               # or an object file, or an extension
    python benchmarks/gpu_static.py csrc/cuda/loss_float.cu --arch sm_90        # compiled first, by nvcc
    python benchmarks/gpu_static.py kernels.cubin --itemsize 2 --held 32        # bf16, 32 classes held by a thread

A hot loop is an innermost loop that reads or writes logits in vectors. Its classes are those that a thread handles in
one pass over its body. What a warp executes once is the way through the rest that meets most vectors and exponentials,
and of those the shortest: that of a row whose teacher is right, with what part of the correction has an exponential
outside of a loop, so that the count is never too low. Kernels that go from row to row say beside it what one more row
takes, without the launch's own beginning and end and without the correction.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Container, Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
_EXPONENTIAL = "MUFU.EX2"


class Instruction(NamedTuple):
    """One instruction: its address, whether it may be skipped, its opcode with modifiers, and a branch's target."""

    address: int
    conditional: bool
    opcode: str
    target: int | None

    @property
    def wide(self) -> int:
        """The bytes that a thread moves by an access of a vector, 0 for any other instruction."""
        if not self.opcode.startswith(("LDG", "STG", "LDS")):
            return 0
        # Entries of the correction's list in shared memory have 8 bytes.
        return 16 if ".128" in self.opcode else 8 if ".64" in self.opcode and self.opcode[2] == "G" else 0


class Piece(NamedTuple):
    """Instructions that are executed together: of a pass over a loop, or of the way outside of the loops."""

    opcodes: tuple[str, ...]
    loaded: int  # bytes of a thread, by wide accesses
    stored: int

    @staticmethod
    def of(code: Iterable[Instruction]) -> Piece:
        """The piece made of these instructions."""
        code = tuple(code)
        moved = {kind: sum(x.wide for x in code if x.opcode.startswith(kind)) for kind in ("LD", "ST")}
        return Piece(tuple(x.opcode for x in code), moved["LD"], moved["ST"])

    def count(self, prefix: str) -> int:
        """The instructions whose opcode begins so."""
        return sum(opcode.startswith(prefix) for opcode in self.opcodes)

    def classes(self, itemsize: int) -> float:
        """The classes of a pass: as many as it writes gradients, or half the logits that it reads, of both sides."""
        return (self.stored or self.loaded / 2) / itemsize


class Kernel:
    """The compiled form of one kernel.

    Attributes:
        name: the (mangled) name.
        registers, stack: of a thread; a stack holds spills and arrays that found no registers.
    """

    def __init__(self, name: str, text: str, registers: int, stack: int) -> None:
        self.name, self.registers, self.stack = name, registers, stack
        found = [(int(a, 16), bool(p), o, rest) for a, p, o, rest in _INSTRUCTION.findall(text) if o != "NOP"]
        # `BRA P0, 0x10` has its condition among the operands.
        self.code = [
            Instruction(a, guard or (o.startswith("BRA") and "," in rest), o, _target(o, rest))
            for a, guard, o, rest in found
        ]

    @property
    def local_accesses(self) -> int:
        """Instructions that touch local memory."""
        return sum(x.opcode.startswith(("LDL", "STL")) for x in self.code)

    @cached_property
    def fetched(self) -> int:
        """Instructions that a warp whose lanes stay together can reach. Behind the kernel's end lie the others: failed
        assertions, and collectives once more, for diverged lanes."""
        return len(self._order[0])

    def count(self, prefix: str) -> int:
        """Instructions of the whole code whose opcode begins so."""
        return sum(x.opcode.startswith(prefix) for x in self.code)

    def per_class(self, itemsize: int, held: float = 0) -> dict[str, float]:
        """Instructions and exponentials that a thread executes for each of its classes, for a row of rank 0.

        Args:
            itemsize: bytes of a logit.
            held: the classes that a thread holds, over which the way outside of the hot loops is spread; 0 leaves it
                out, as a long row does.
        """
        pieces = [(piece, piece.classes(itemsize)) for piece in self.hot_loops]
        kinds: dict[tuple[int, bool, bool], tuple[float, float]] = {}
        for piece, classes in pieces:
            issued, exponentials = len(piece.opcodes) / classes, piece.count(_EXPONENTIAL) / classes
            # The compiler splits a loop into an unrolled one and a rest of the same kind: the cheaper one counts.
            kind = (round(exponentials), bool(piece.loaded), bool(piece.stored))
            kinds[kind] = min(kinds.get(kind, (issued, exponentials)), (issued, exponentials))
        if held:
            kinds[-1, False, False] = len(self.once.opcodes) / held, self.once.count(_EXPONENTIAL) / held
        return {
            name: round(sum(x[i] for x in kinds.values()), 1) for i, name in enumerate(("instructions", "exponentials"))
        }

    @cached_property
    def hot_loops(self) -> list[Piece]:
        """The hot loops in the order of the code."""
        return [Piece.of(self.code[i] for i in [*self._way(head, back), back]) for head, back, _ in self._loops]

    @cached_property
    def once(self) -> Piece:
        """What is executed outside of the hot loops."""
        skipped = {i for _, _, body in self._loops for i in body}
        # Of the instructions that end the kernel for every thread, or for those that are left, that of the busiest way.
        ends = [i for i in self._order[0] if self.code[i].opcode == "EXIT" and not self.code[i].conditional]
        ways = [[*self._way(0, end, self._quiet), end] for end in ends]
        return Piece.of(self.code[i] for i in max(ways, key=self._work) if i not in skipped)

    def row(self, warps: int = 1) -> float:
        """Instructions of one more row of rank 0, the mean of so many warps; 0 for a kernel that has no loop over rows.

        Of the loop around the stores of whole vectors, it is the shortest way that meets them all. Exponentials in
        loops without such accesses are not looked for: those go over the classes above the label, a row's edges, and
        rows that leave the range of their sums. Of a block's warps one computes the row's terms, known by reciprocals,
        for the others; a kernel without any has no such warp.
        """
        stores = [i for i in self._order[0] if self.code[i].opcode.startswith("STG") and self.code[i].wide == 16]
        around = [x for x in self._all_loops if all(i in x[2] for i in stores)]
        if not stores or not around:
            return 0
        # What lies in shared memory is read again where a class is above the label.
        quiet = self._quiet | {i for i, x in enumerate(self.code) if x.opcode.startswith("LDS")}
        # What is loaded after the stores, logits and a label, is of a row behind one with a list.
        quiet |= {i for i, x in enumerate(self.code) if x.opcode.startswith("LDG") and i > max(stores)}
        head, back, body = min(around, key=lambda x: len(x[2]))
        other = len(self._way(head, back, quiet))
        through = []
        for i in body:
            if self.code[i].opcode == "MUFU.RCP":
                with contextlib.suppress(ValueError):  # of a loop that ends at its head there is no way on
                    through.append(len(self._way(head, i, quiet)) + len(self._way(i, back, quiet)))
        return 1 + (min(through, default=other) + (warps - 1) * other) / warps

    @cached_property
    def _quiet(self) -> set[int]:
        """Loops without global accesses of 16 bytes: over labels, sums of other rows, the classes above the label."""
        wide = {i for i, x in enumerate(self.code) if x.wide == 16 and not x.opcode.startswith("LDS")}
        return {i for _, _, body in self._all_loops if not body & wide for i in body}

    @cached_property
    def _next(self) -> list[list[int]]:
        """The instructions that may follow each."""
        at, graph = {x.address: i for i, x in enumerate(self.code)}, []
        for i, x in enumerate(self.code):
            after = [i + 1] if i + 1 < len(self.code) else []
            name = x.opcode.split(".")[0]
            if name == "BRA":
                # A branch of diverged lanes around a collective: a warp that holds whole rows does not diverge.
                taken = [at[x.target]] if ".DIV" not in x.opcode and x.target in at else []
                after = taken + (after if x.conditional else [])
            elif name == "CALL" and x.conditional:
                # On sm_80 a jump out of a loop has this form.
                after = [*after, *([at[x.target]] if x.target in at else [])]
            elif x.opcode.startswith("CALL.REL"):
                pass  # there the lanes of a warp wait for each other, and it returns
            elif name == "CALL" or (name in ("EXIT", "RET", "BRX", "JMX", "BPT") and not x.conditional):
                after = []  # a failed assertion, or the end
            graph.append(after)
        return graph

    @cached_property
    def _order(self) -> tuple[list[int], set[tuple[int, int]]]:
        """The instructions that can be reached, each after all that lead to it but by a branch back; those branches."""
        order, back, open_ = [], set(), {0}
        seen, stack = {0}, [(0, iter(self._next[0]))]
        while stack:
            i, after = stack[-1]
            j = next(after, None)
            if j is None:
                order.append(i)
                open_.discard(i)
                stack.pop()
            elif j not in seen:
                seen.add(j)
                open_.add(j)
                stack.append((j, iter(self._next[j])))
            elif j in open_:
                back.add((j, i))
        return order[::-1], back

    @cached_property
    def _all_loops(self) -> list[tuple[int, int, set[int]]]:
        """Head, branch back and body of each loop."""
        before: dict[int, list[int]] = {}
        for i in self._order[0]:
            for j in self._next[i]:
                before.setdefault(j, []).append(i)
        loops = []
        for head, back in sorted(self._order[1]):
            body, todo = {head}, [back]
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo += before.get(i, [])
            loops.append((head, back, body))
        return loops

    @cached_property
    def _loops(self) -> list[tuple[int, int, set[int]]]:
        """Those of the hot loops."""
        loops = self._all_loops
        inner = [x for x in loops if not any(y[2] < x[2] for y in loops)]
        return [x for x in inner if self._is_hot([self.code[i] for i in self._way(x[0], x[1])])]

    def _is_hot(self, body: list[Instruction]) -> bool:
        # A loop with neither maxima nor exponentials that writes nothing orders the correction's list. Vectors in
        # shared memory are logits only where they came there by asynchronous copies.
        on_logits = any(x.opcode.startswith((_EXPONENTIAL, "FMNMX", "HMNMX")) for x in body)
        kinds = ("LDG", "LDS") if self.count("UBLKCP") + self.count("LDGSTS") else ("LDG",)
        return any(x.wide and (x.opcode.startswith("STG") or (on_logits and x.opcode.startswith(kinds))) for x in body)

    def _work(self, way: Iterable[int]) -> int:
        """What makes a way busy: the bytes of its vectors, and its exponentials."""
        return sum(self.code[i].wide + self.code[i].opcode.startswith(_EXPONENTIAL) for i in way)

    def _way(self, start: int, end: int, quiet: Container[int] = ()) -> list[int]:
        """The busiest way from one instruction to another, without the last, and of those the shortest. What `quiet`
        holds does not make a way busy."""
        order, back = self._order
        best: dict[int, tuple[int, int]] = {start: (0, 0)}
        before: dict[int, int] = {}
        for i in order:
            if i not in best or i == end:
                continue
            work = 0 if i in quiet else self._work([i])
            reached = (best[i][0] - work, best[i][1] + 1)
            for j in self._next[i]:
                if (j, i) not in back and (j not in best or reached < best[j]):
                    best[j], before[j] = reached, i
        if end not in best:
            raise ValueError(f"{self.name}: no way from instruction {start} to {end}")
        way = [end]
        while way[-1] != start:
            way.append(before[way[-1]])
        return way[:0:-1]


def _target(opcode: str, operands: str) -> int | None:
    found = re.search(r"(0x[0-9a-f]+)\s*$", operands.strip()) if opcode.startswith(("BRA", "CALL.REL")) else None
    return int(found[1], 16) if found else None


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or in triton's package."""
    if path := shutil.which(name):
        return path
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


def read(path: Path, arch: str | None = None) -> list[Kernel]:
    """Every kernel of a cubin, an object file or a library, there of one architecture, by cuobjdump.

    Raises:
        FileNotFoundError: there is no cuobjdump.
    """
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise FileNotFoundError("gpu_static: cuobjdump is neither on PATH nor in triton's package")
    command = [cuobjdump, *(["-arch", arch] if arch else []), "-res-usage", "-sass", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: (int(registers), int(stack)) for name, registers, stack in _USAGE.findall(text)}
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return [Kernel(name, body, *usage[name]) for name, body in zip(parts[1::2], parts[2::2], strict=True)]


def compiled(source: Path, arch: str, output: Path) -> Path:
    """A .cu file as a cubin in the folder ``output``."""
    cubin = output / f"{source.stem}.{arch}.cubin"
    command = ["nvcc", "-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-arch={arch}", "-cubin", "-o", cubin, source]
    subprocess.run(command, check=True)
    return cubin


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="cubins, object files, extensions; .cu files are compiled")
    parser.add_argument("--arch", help="for a .cu file (sm_90), or one of those in an extension")
    parser.add_argument("--itemsize", type=int, default=4, help="bytes of a logit (4)")
    parser.add_argument("--held", type=float, default=0, help="classes that a thread holds in registers")
    parser.add_argument("--warps", type=int, default=1, help="warps of a block that holds a row (1)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the kernels whose name matches")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for path in args.files:
            is_source = path.suffix == ".cu"
            binary = compiled(path, args.arch or "sm_90", Path(folder)) if is_source else path
            for k in read(binary, None if is_source else args.arch):
                if not re.search(args.only, k.name):
                    continue
                wide = {x: sum(i.wide == 16 for i in k.code if i.opcode.startswith(x)) for x in ("LDG", "STG")}
                print(
                    f"{k.name}\n  {k.registers} registers, {k.stack} bytes of stack, {k.local_accesses} accesses of "
                    f"local memory, {len(k.code)} instructions ({k.fetched} without diverged lanes), "
                    f"{k.count(_EXPONENTIAL)} exponentials; 16-byte accesses of global memory: {wide['LDG']} loads, "
                    f"{wide['STG']} stores\n"
                    f"  a class: {k.per_class(args.itemsize, args.held)}"
                    + (f"; of one more row: {k.row(args.warps) / args.held:.1f}" if k.row() and args.held else "")
                )
                for piece in k.hot_loops:
                    print(
                        f"  hot loop: {len(piece.opcodes)} instructions, {piece.count(_EXPONENTIAL)} exponentials, "
                        f"{piece.classes(args.itemsize):g} classes"
                    )


if __name__ == "__main__":
    main()
