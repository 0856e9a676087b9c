"""Machine code of a kernel, read without a GPU: what one warp executes on the way of a row whose teacher is right.

The code is a graph of instructions. A kernel that holds a row is walked from its first instruction to its last, through
every wide access and every exponential that one way can pass, and by the fewest instructions besides: no loop of the
correction is entered, no assertion fails. A kernel that streams a row is walked by the fewest instructions, but through
each loop with wide loads and exponentials once for every block of the row. Callers compare the wide loads, the wide
stores and the exponentials found with what a whole row needs.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+)")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT")


class Instruction(NamedTuple):
    """One instruction: its address, whether a predicate guards it, opcode with modifiers, and a branch's target."""

    address: int
    guarded: bool
    opcode: str
    target: int | None

    @property
    def width(self) -> int:
        """The bytes that a lane moves."""
        parts = self.opcode.split(".")
        return next((int(p) // 8 for p in parts if p in ("32", "64", "128")), 2 if "U16" in parts else 4)


class Way(NamedTuple):
    """How often a warp executes each opcode, and the wide accesses of one pass over the code (loops once)."""

    opcodes: Counter[str]
    trips: int

    def count(self, *prefixes: str) -> int:
        """Executed instructions whose opcode begins so."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes))


class Code:
    """The instructions of one kernel.

    Attributes:
        name: the kernel's (mangled) name.
        registers: of a thread, of the resource report.
    """

    def __init__(self, name: str, text: str, registers: int) -> None:
        self.name, self.registers = name, registers
        found = [(int(a, 16), bool(p), o, rest) for a, p, o, rest in _INSTRUCTION.findall(text)]
        self.instructions = [Instruction(a, p, o, _target(o, rest)) for a, p, o, rest in found if o != "NOP"]
        self._at = {x.address: i for i, x in enumerate(self.instructions)}
        # `BRA P0, 0x10` has its condition among the operands.
        self._conditional = {a for a, p, o, rest in found if p or "," in rest}

    @property
    def local_accesses(self) -> int:
        """Instructions that touch local memory: spills, and arrays that found no registers."""
        return sum(x.opcode.startswith(("LDL", "STL")) for x in self.instructions)

    @cached_property
    def _next(self) -> list[list[int]]:
        """The instructions that may follow each."""
        graph = []
        for i, x in enumerate(self.instructions):
            after = [i + 1] if i + 1 < len(self.instructions) else []
            name = x.opcode.split(".")[0]
            if name == "BRA":
                # A branch of diverged lanes around a collective: a warp that holds whole rows does not diverge.
                taken = [] if ".DIV" in x.opcode else [self._at[x.target]] if x.target in self._at else []
                after = taken + (after if x.address in self._conditional else [])
            elif name == "CALL" and x.guarded and x.target in self._at:
                after = [self._at[x.target], *after]  # how sm_80 leaves a loop of collectives
            elif name == "CALL" or (name in _ENDS and not x.guarded):
                after = []  # the failed assertion, or diverged lanes; a guarded exit is not that of a whole row
            graph.append(after)
        return graph

    @cached_property
    def _order(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The instructions that can be reached, each after all that lead to it but by a branch back; those branches."""
        state, order, back = {}, [], []
        stack = [(0, iter(self._next[0]))]
        state[0] = 1
        while stack:
            i, after = stack[-1]
            j = next(after, None)
            if j is None:
                state[i] = 2
                order.append(i)
                stack.pop()
            elif j not in state:
                state[j] = 1
                stack.append((j, iter(self._next[j])))
            elif state[j] == 1:
                back.append((j, i))
        return order[::-1], back

    def _streams(self) -> list[tuple[int, int, list[int]]]:
        """Head, branch back and body of each loop over the blocks of a row."""
        before: dict[int, list[int]] = {}
        for i, after in enumerate(self._next):
            for j in after:
                before.setdefault(j, []).append(i)
        found = []
        for head, back in self._order[1]:
            body, todo = {head}, [back]
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo += before.get(i, [])
            code = [self.instructions[i] for i in sorted(body)]
            if any(map(is_wide_load, code)) and any(x.opcode.startswith("MUFU.EX2") for x in code):
                found.append((head, back, sorted(body)))
        inner = [x for x in found if not any(set(y[2]) < set(x[2]) for y in found)]
        return sorted(inner)

    def _walk(self, start: int, end: int, busiest: bool) -> list[int] | None:
        """A way from one instruction to another, without the last: the fewest, or the busiest and then the fewest."""
        best: dict[int, tuple[int, int]] = {start: (0, 0)}
        before: dict[int, int] = {}
        order, back = self._order
        closed = set(back)
        for i in order:
            if i not in best or i == end:
                continue
            work, steps = best[i]
            x = self.instructions[i]
            work -= busiest and (is_wide_load(x) or x.opcode.startswith(("MUFU.EX2", "STG.E.128")))
            for j in self._next[i]:
                if (j, i) not in closed and (work, steps + 1) < best.get(j, (1, 0)):
                    best[j], before[j] = (work, steps + 1), i
        if end not in best:
            return None
        way = [end]
        while way[-1] != start:
            way.append(before[way[-1]])
        return way[:0:-1]

    def way(self, row_bytes: int, lanes: int) -> Way:
        """What a warp executes for a row of ``row_bytes`` on each side, held by so many lanes (or rows, by theirs)."""
        order, _ = self._order
        last = max(i for i in order if self.instructions[i].opcode == "EXIT" and not self.instructions[i].guarded)
        streams = self._streams()
        executed: Counter[str] = Counter()
        starts, trips = [0], 1
        for head, back, body in streams:
            self._pass(executed, starts, head, busiest=False)
            loads = [self.instructions[i] for i in body if is_wide_load(self.instructions[i])]
            trips = -(-row_bytes // (sum(x.width for x in loads) * lanes // 2))  # blocks of each side
            for i in [*self._walk(head, back, busiest=True), back]:
                executed[self.instructions[i].opcode] += trips
            starts = [j for i in body for j in self._next[i] if j not in body]
        self._pass(executed, starts, last, busiest=not streams)
        executed["EXIT"] += 1
        return Way(executed, trips)

    def _pass(self, executed: Counter[str], starts: list[int], end: int, busiest: bool) -> None:
        """Add what is executed from one of the starts, the nearest, to an end."""
        ways = [way for start in starts if (way := self._walk(start, end, busiest)) is not None]
        if not ways:
            raise ValueError(f"{self.name}: no way to instruction {end}")
        executed.update(self.instructions[i].opcode for i in min(ways, key=len))


def is_wide_load(x: Instruction) -> bool:
    """Whether an instruction loads 8 or 16 bytes a lane from global memory."""
    return x.opcode.startswith("LDG") and x.width >= 8


def _target(opcode: str, operands: str) -> int | None:
    if not opcode.startswith(("BRA", "CALL.REL")):
        return None
    found = re.search(r"(0x[0-9a-f]+)\s*$", operands.strip())
    return int(found[1], 16) if found else None


def read(path: Path, tool: Path, *options: str) -> dict[str, Code]:
    """Every kernel of a cubin, object file or library, by name; ``tool`` is cuobjdump."""
    command = [tool, *options, "-res-usage", "-sass", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = {name: int(number) for name, number in _USAGE.findall(text)}
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return {name: Code(name, body, registers[name]) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
