# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The corrected teacher alone: every value copied once, those of the classes above the label moved by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .layout import alignment, as_rows
from .loss import NONE, WORK
from .order import collect, corrected_above, put_in_order
from .rows import aligned, class_offset, leave, read_label, value_at


@triton.jit(do_not_specialize=["N", "ignore_index", "first_row"])
def sort_kd_logits(
    teacher, target, corrected, N, C, teacher_outer, teacher_class, ignore_index,
    listed, tally, scratch, capacity, first_row,
    CORRECTION: tl.constexpr, ALIGN: tl.constexpr, WORK: tl.constexpr,
    LEFT: tl.constexpr, MERGE: tl.constexpr, BUFFERS: tl.constexpr, STRIDE_ROWS: tl.constexpr,
    RUN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One row at a time, B classes at a time; LEFT, capacity and rows as in `sort_kd_stream`."""
    C = aligned(C, ALIGN)
    program = tl.program_id(0)
    keys = scratch + program.to(tl.int64) * capacity * BUFFERS
    begin = first_row + program
    end = begin + 1
    step = 1
    if STRIDE_ROWS:
        end = N
        step = tl.num_programs(0)
    if LEFT:
        end = tl.load(tally)
    for place in range(begin, end, step):
        rows = place + tl.arange(0, 1)
        if LEFT:
            rows = tl.load(listed + rows)
        label, counts = read_label(target, rows, rows < N, ignore_index, C)
        t_row = teacher + (rows.to(tl.int64) * aligned(teacher_outer, ALIGN))[:, None]
        t_y = value_at(t_row, label, teacher_class, counts, WORK)
        ranked = tl.sum(tl.zeros_like(label), 0)
        broken = ranked
        for start in range(0, C, B):
            classes = start + tl.arange(0, B)[None, :]
            held = (classes < C) & counts[:, None]
            t = tl.load(t_row + class_offset(classes, teacher_class), mask=held, other=0).to(WORK)
            broken += tl.sum(tl.sum((t != t).to(tl.int32), 1), 0)
            above = held & (t > t_y[:, None])
            found = tl.sum(tl.sum(above.to(tl.int32), 1), 0)
            if CORRECTION != 0:
                if found > 0:
                    collect(keys, t, classes, above, ranked, capacity)
                ranked += found
        if broken > 0:
            ranked = tl.zeros_like(ranked)
        if listed is not None and not LEFT:  # noqa: SIM102 - this one is the compiler's to decide, the next the device's
            if ranked > capacity:
                leave(rows, rows >= 0, listed, tally)
        if ranked <= capacity:
            t_new = t_y
            order = keys
            if ranked > 0:
                order = keys + put_in_order(keys, ranked, t_row, teacher_class, capacity, RUN, MERGE, WORK)
                first = tl.load(order + tl.arange(0, 1)) & 0xFFFFFFFF
                t_new = value_at(t_row, first, teacher_class, counts, WORK)
            out = corrected + (rows.to(tl.int64) * C)[:, None]
            for start in range(0, C, B):
                classes = start + tl.arange(0, B)[None, :]
                held = classes < C
                t = tl.load(t_row + class_offset(classes, teacher_class), mask=held, other=0).to(WORK)
                t = tl.where((classes == label[:, None]) & counts[:, None], t_new[:, None], t)
                # One NaN spoils the row, as it spoils the row's loss.
                t = tl.where(broken > 0, float("nan"), t)
                tl.store(out + classes, t.to(corrected.dtype.element_ty), mask=held)
            tl.debug_barrier()
            for start in range(0, ranked, RUN):
                classes, inside, t = corrected_above(
                    order, start, ranked, t_row, teacher_class, t_y, CORRECTION, WORK, RUN
                )
                tl.store(out + classes, t.to(corrected.dtype.element_ty), mask=inside)
        # The program's next row overwrites its scratch.
        tl.debug_barrier()


@launch.on_device_of_first
def sort_logits(teacher: Tensor, target: Tensor, correction: int, ignore_index: int) -> Tensor:
    """:func:`sortkd_kernels.reference.correct_logits` along the last dimension, in a new contiguous tensor.

    Args:
        teacher: logits ``[..., C]``.
        target: labels ``[...]``; rows of ``ignore_index`` are returned as they are.
        correction: 0 none, 1 sort, 2 swap.
    """
    N, C, device = target.numel(), teacher.shape[-1], teacher.device
    work = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    t, target = as_rows(teacher, 1), target.contiguous()
    corrected = torch.empty(teacher.shape, dtype=teacher.dtype, device=device)
    leftovers = correction != NONE and C - 1 > launch.RUN
    listed = torch.empty(N, dtype=torch.int32, device=device) if leftovers else None
    tally = torch.zeros(1, dtype=torch.int32, device=device) if leftovers else None
    for left in (False, True)[: 1 + leftovers] if N else ():
        plan = launch.stream(N, C, work, left, False, device)
        keys = plan.programs * plan.capacity * plan.buffers if correction != NONE else 0
        scratch = torch.empty(keys, dtype=torch.int64, device=device)
        for first_row in range(0, 1 if plan.stride_rows else N, plan.programs):
            sort_kd_logits[(min(plan.programs, N - first_row),)](
                t.data, target, corrected, N, C, t.outer, t.classes, ignore_index,
                listed, tally, scratch, plan.capacity, first_row,
                CORRECTION=correction, ALIGN=alignment(C, t.outer), WORK=WORK[work],
                LEFT=left, MERGE=plan.capacity > plan.run, BUFFERS=plan.buffers, STRIDE_ROWS=plan.stride_rows,
                RUN=plan.run, B=plan.block, **plan.options, **launch.DEVICE_ASSERT,
            )  # fmt: skip
    return corrected
