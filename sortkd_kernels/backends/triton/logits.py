# ruff: noqa: ANN001, ANN201 - in a kernel annotations are types of the compiler, and a constant `if` stands alone
"""The corrected teacher alone: every value copied once, those of the classes above the label moved by one."""

from __future__ import annotations

import triton
import triton.language as tl

from .order import RUN, collect, corrected_above, put_in_order
from .row_io import read_label
from .row_math import total, wide


@triton.jit(
    do_not_specialize=[
        "target", "rank", "scratch", "N", "C", "outer", "step", "ignore_index", "correction", "max_rank", "capacity"
    ]
)  # fmt: skip
def sort_kd_logits(
    teacher, target, corrected, rank, scratch, N: tl.int32, C: tl.int32, outer: tl.int64, step: tl.int64,
    ignore_index: tl.int64, correction: tl.int32, max_rank: tl.int32, capacity: tl.int32,
    WORK: tl.constexpr, LISTED: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows ``program, program + programs, ...``; LISTED, capacity and max_rank as in `sort_kd_long_rows`.

    ALIGN divides C and `outer`, where `step` is 1; else it is 0.
    """
    if ALIGN != 0:
        C = C // ALIGN * ALIGN
        outer = outer // ALIGN * ALIGN
        step = tl.full([], 1, tl.int64)
    STEP: tl.constexpr = B if LISTED else RUN
    program = tl.program_id(0)
    keys = scratch + program.to(tl.int64) * capacity * (3 if tl.float64 == WORK else 2)
    for row in range(program, N, tl.num_programs(0)):
        rows = row + tl.arange(0, 1)
        wanted = row < N
        if LISTED:
            wanted = tl.load(rank + row) > max_rank
        if wanted:
            label, counts = read_label(target, rows, rows < N, ignore_index, C)
            place = tl.zeros([], tl.int64) + row
            t_row = teacher + place * outer
            out = corrected + place * C
            t_y = tl.load(t_row + label * step, mask=counts, other=float("inf")).to(WORK)
            ranked = tl.zeros([], tl.int32)
            broken = ranked
            for start in range(0, C, B):
                classes = start + tl.arange(0, B)[None, None, :]
                held = (classes < C) & wide(counts)
                t = tl.load(t_row + classes * step, mask=held, other=-float("inf")).to(WORK)
                broken += tl.sum(total((t != t).to(tl.int32)), 0)
                above = t > wide(t_y)
                found = tl.sum(total(above.to(tl.int32)), 0)
                if (found > 0) & (correction != 0):
                    collect(keys, t, classes, above, ranked, capacity)
                    ranked += found
            if broken > 0:
                ranked = tl.zeros_like(ranked)
            if not LISTED:
                tl.store(rank + row, ranked)
            if ranked <= capacity:
                t_new = t_y
                order = keys
                if ranked > 0:
                    order = keys + put_in_order(keys, ranked, t_row, step, capacity, LISTED, WORK, STEP)
                    t_new = tl.load(t_row + (tl.load(order + tl.arange(0, 1)) & 0xFFFFFFFF) * step).to(WORK)
                for start in range(0, C, B):
                    classes = start + tl.arange(0, B)
                    t = tl.load(t_row + classes * step, mask=classes < C, other=0).to(WORK)
                    t = tl.where((classes == label) & counts, t_new, t)
                    # One NaN spoils the row, as it spoils the row's loss.
                    t = tl.where(broken > 0, float("nan"), t)
                    tl.store(out + classes, t.to(corrected.dtype.element_ty), mask=classes < C)
                tl.debug_barrier()
                for start in range(0, ranked, STEP):
                    classes, inside, t = corrected_above(order, start, ranked, t_row, step, t_y, correction, WORK, STEP)
                    tl.store(out + classes, t.to(corrected.dtype.element_ty), mask=inside)
            # The program's next row overwrites its scratch.
            tl.debug_barrier()
