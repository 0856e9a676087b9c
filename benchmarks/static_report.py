"""The tables of `gpu_static.py`, in words that say how each figure was found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cards import CARDS, PIPES
from harness import table

if TYPE_CHECKING:
    from cards import Prediction
    from static_rows import Row

HEAD = """# What the compiled form of the GPU kernels shows

Read off the machine code that Triton (and nvcc, where the extension was built) make for each target, on a machine
without a GPU. Nothing here has run on a GPU and nothing here is a timing. `benchmarks/gpu_static.py` writes this
file, the CSV beside it has every figure, and `python_tests/test_gpu_static.py` holds both to the sources.

- Registers and shared memory: the compiler's resource report. Local memory: instructions of the code that touch it.
- Warps an SM: from these and the limits of the architecture (CUDA C++ Programming Guide, technical specifications).
- The path: what a warp executes for a row of rank 0, where the teacher is right, found in the graph of the code. For a
  kernel that holds a row: the way through the most wide accesses and exponentials, and of those ways the shortest. For
  one that streams it: the shortest way, with each loop over the row's blocks once for every block. Loops of the
  correction have no place on either. A path without the wide accesses and exponentials of a whole row is refused.
  The CUDA kernel's path fills all eight vectors of a lane, also where a row needs seven (C = 100).
- Per element: instructions of the path times the lanes that execute them, over rows times C; lanes that hold no class
  of a padded row count too.
- Bytes over least: passes of the path over a row, times C e, plus 20 bytes for the label and the row's results, over
  3 C e. The least is each logit read once and each gradient written once. A second pass of a streamed row counts in
  full, although the level 2 cache may serve it.
- The call is KD with cross-entropy at temperature 4, mean over rows, with gradient.
"""

MODEL = """## The model

A model, never a timing. For one row on one SM it compares clocks: the row's bytes over the SM's share of the card's
peak bandwidth; its instructions over the four schedulers' 128 lanes a clock; and the instructions of each pipe over
that pipe's lanes a clock (CUDA C++ Programming Guide, arithmetic throughput: special functions 16, compare, select
and integer 64, multiply-add 64 on sm_80 and 128 on the others; shuffles, shared and global accesses 32). The longest
binds. The predicted share of peak bandwidth is a range: at most what is reached if memory and arithmetic overlap
perfectly, at least what is left if neither overlaps the other. Latency, launch overhead, and what DRAM really reaches
of its peak are not modelled.
"""


def markdown(rows: list[Row], promises: list[tuple[str, list[str]]], model: list[tuple[str, Row, Prediction]]) -> str:
    """The whole document."""
    paths = [r for r in rows if r.reads is not None]
    others = [r for r in rows if r.reads is None]
    text = [HEAD, "## What must hold", ""]
    text += table(
        ["promise", ""], [[p, "holds" if not bad else f"**missed**: {'; '.join(bad)}"] for p, bad in promises]
    )
    text += ["", "## The kernel that meets a row first", ""]
    text += table(
        ["backend", "C", "", "target", "kernel", "lanes x rows", "registers", "shared", "warps an SM", "load, store",
         "passes", "bytes / least", "instructions", *PIPES],
        [
            [r.backend, f"{r.C}", r.dtype, r.target, r.kernel, f"{r.lanes} x {r.rows}", f"{r.registers}", f"{r.shared}",
             f"{r.warps_per_sm}", f"{r.load_bytes}, {r.store_bytes}", f"{r.reads} + {r.writes}", f"{r.bytes_ratio:.3f}",
             f"{r.instructions:.1f}", f"{r.special_function:.1f}", f"{r.multiply_add:.1f}",
             f"{r.integer_and_compare:.1f}", f"{r.shuffle_and_shared_memory:.1f}"]
            for r in sorted(paths, key=lambda r: (r.backend, r.C, r.dtype != "fp32", int(r.target.removeprefix("sm_"))))
        ],
    )  # fmt: skip
    text += ["", MODEL]
    text += table(
        ["card", "SMs", "bandwidth", "clock", "source"],
        [[n, f"{c.processors}", f"{c.bytes_per_s / 1e12:.3f} TB/s", f"{c.hertz / 1e9:.2f} GHz", c.source]
         for n, c in CARDS.items()],
    )  # fmt: skip
    text += [""]
    text += table(
        ["card", "backend", "C", "", "what binds", "predicted share of peak bandwidth"],
        [[name, r.backend, f"{r.C}", r.dtype, p.binds, f"{100 * p.least:.0f}% to {100 * p.most:.0f}%"]
         for name, r, p in model],
    )  # fmt: skip
    sections = {
        "Every other kernel of the table, compiled by Triton": [r for r in others if not r.case],
        "The launches of Triton that press hardest on the registers": [r for r in others if r.case and r.C],
        "Every CUDA kernel": [r for r in others if not r.C],
    }
    for title, found in sections.items():
        text += ["", f"## {title}", "", *_resources(found)]
    return "\n".join([*text, ""])


def _resources(rows: Iterable[Row]) -> list[str]:
    """One line for the kernels that differ in their size only."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        key = (
            r.backend,
            r.kernel + (", rows left" if r.left else ""),
            r.case,
            r.dtype,
            f"{r.C}" if r.case and r.C else "",
        )
        groups.setdefault(key, []).append(r)
    lines = []
    for key, group in groups.items():
        targets = {t: [r for r in group if r.target == t] for t in dict.fromkeys(r.target for r in group)}
        registers = ", ".join(f"{t} {max(r.registers for r in found)}" for t, found in targets.items())
        lines.append([*key, registers, f"{max(r.shared for r in group)}", f"{max(r.local for r in group)}"])
    return table(["backend", "kernel", "call", "", "C", "registers, at most", "shared", "local accesses"], lines)
