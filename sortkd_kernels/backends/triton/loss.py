"""The loss and its gradient in one pass: shapes and pointers in, kernels launched, nothing read back."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .layout import alignment, as_rows, dense_rows, inner_size
from .reduce import sort_kd_count, sort_kd_reduce, sort_kd_scale
from .stream import sort_kd_stream
from .tile import sort_kd_tile

NONE, SORT, SWAP = range(3)
ROWS, SUM, MEAN = range(3)
WORK = {torch.float32: tl.float32, torch.float64: tl.float64}


@launch.on_device_of_first
def loss_forward(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature_tensor: Tensor | None, config: Any, grad_output: Tensor | None, with_grad: bool, learned: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of :func:`sortkd_kernels.reference.loss_rows`, reduced, and its gradient.

    Args:
        student, teacher: logits ``[..., C]``, with any strides.
        teacher_indices: the classes of ``teacher``'s values where it is a top-k teacher.
        temperature_tensor: 0-d or one value a row; takes the place of ``config.temperature``.
        config: the options, a :class:`sortkd_kernels.ops.LossConfig`.
        grad_output: the gradient that reaches the loss, a scalar or one value a row; None stands for 1. It multiplies
            in the working precision, before the gradient's one rounding.
        with_grad, learned: which gradients to make; without, no tensor of the student's size is allocated.
        inplace: write the student's gradient over ``student``, which must be contiguous.

    Returns:
        ``loss, kd, ce, rank, grad_student, grad_temperature``; what is not asked for is empty.
    """
    N, C, device = target.numel(), student.shape[-1], student.device
    correction, standardize, reduction = config.correction, config.standardize, config.reduction
    temperature, kd_weight, ce_weight, with_ce = config.temperature, config.kd_weight, config.ce_weight, config.with_ce
    work = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    target = target.contiguous()

    def new(shape: Any, dtype: torch.dtype = work) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    kd_rows, ce_rows = new(target.shape), new(target.shape)
    rank = new(target.shape, torch.int32)
    loss_rows = new(target.shape) if reduction == ROWS else None
    grad_student = new(0, student.dtype)
    if with_grad:
        grad_student = student if inplace else torch.empty_like(student)
    grad_temperature = new(N if learned else 0)
    top_k = teacher_indices is not None
    on_chip = not top_k and launch.on_chip(C, work, standardize or learned)
    settled = launch.SHALLOW_RANK if on_chip else launch.RUN
    # What a launch leaves to the next: ranks over its limit, which no label can have where the classes are few. A tile
    # swaps at any rank.
    leftovers = settled < C - 1 and (correction == SORT or (correction == SWAP and not on_chip))
    tallies = _tallies(target, config.ignore_index if reduction == MEAN else None)
    count = tallies[:1] if reduction == MEAN else None
    left = (new(N, torch.int32), tallies[4:]) if leftovers else (None, None)

    inner = inner_size(student)
    s, t = as_rows(student, inner), as_rows(teacher.contiguous() if top_k else teacher, 1 if top_k else inner)
    g = as_rows(grad_student, inner) if with_grad else s
    arguments = (
        s.data, t.data, target, None if temperature_tensor is None else temperature_tensor.contiguous(),
        None if grad_output is None else grad_output.contiguous(), count,
        kd_rows, ce_rows, loss_rows, rank, g.data if with_grad else None, grad_temperature,
        N, C, inner, s.outer, s.inner, s.classes, t.outer, t.inner, t.classes,
        g.outer, g.inner, g.classes,
        _row_stride(temperature_tensor), _row_stride(grad_output), config.ignore_index,
        float(temperature), float(kd_weight), float(config.alpha), config.beta_of(C), float(ce_weight),
    )  # fmt: skip
    flags = {
        "CORRECTION": correction, "DECOUPLED": config.beta is not None, "STANDARDIZE": standardize, "LEARNED": learned,
        "CE": with_ce, "POWER": 0 if temperature_tensor is not None or standardize else _power(temperature),
        "ALIGN": alignment(C, s.outer, C if top_k else t.outer, g.outer), "WORK": WORK[work], **launch.DEVICE_ASSERT,
    }  # fmt: skip
    if N and on_chip:
        neighbours = s.classes != 1
        tile = launch.tile(C, neighbours, work, standardize or learned)
        programs = N // inner * triton.cdiv(inner, tile.rows) if neighbours else triton.cdiv(N, tile.rows)
        sort_kd_tile[(programs,)](
            *arguments, *left, 0, **flags, LIMIT=launch.SHALLOW_RANK, NEIGHBOURS=neighbours,
            R=tile.rows, B=tile.classes, **tile.options,
        )  # fmt: skip
    for second in [False] * (not on_chip) + [True] * leftovers if N else ():
        plan = launch.stream(N, C, work, second, top_k, device)
        scratch = new(plan.programs * plan.capacity * plan.buffers if correction != NONE else 0, torch.int64)
        dense = new(plan.programs * C) if top_k else None
        for first_row in range(0, 1 if plan.stride_rows else N, plan.programs):
            sort_kd_stream[(min(plan.programs, N - first_row),)](
                *arguments, *left, scratch, plan.capacity, teacher_indices.contiguous() if top_k else None, dense,
                teacher.shape[-1], first_row, **flags, **plan.options, LEFT=second,
                MERGE=plan.capacity > plan.run, BUFFERS=plan.buffers, STRIDE_ROWS=plan.stride_rows,
                UNIFORM=config.uniform_tail, RUN=plan.run, B=plan.block,
            )  # fmt: skip
    if with_grad and g.data is not grad_student:  # whose strides do not collapse to three
        grad_student.copy_(g.data)
    loss, kd, ce = loss_rows, kd_rows, ce_rows
    if reduction != ROWS:
        loss, kd, ce = _reduced(kd_rows, ce_rows, count, float(kd_weight), float(ce_weight), with_ce)
    if not config.parts:
        kd, ce, rank = new(0), new(0), new(0, torch.int32)
    return loss, kd, ce, rank, grad_student, grad_temperature


@launch.on_device_of_first
def scale_gradient(grad_student: Tensor, grad_output: Tensor) -> Tensor:
    """Multiply a gradient in place by a scalar or by one value a row; a scalar 1 costs no memory traffic.

    Args:
        grad_student: a gradient ``[..., C]`` that :func:`loss_forward` made, in its layout.
        grad_output: 0-d, or one value a row, of the target's shape.
    """
    total, inner = grad_student.numel(), inner_size(grad_student)
    if grad_output.dim() and not dense_rows(grad_student, inner):
        return grad_student.mul_(grad_output.unsqueeze(-1))
    if total:
        work = torch.float64 if grad_student.dtype == torch.float64 else torch.float32
        block = 4 * launch.ROW_BLOCK
        sort_kd_scale[(triton.cdiv(total, block),)](
            grad_student, grad_output.contiguous(), total, grad_student.shape[-1] * inner, inner,
            ONE=grad_output.dim() == 0, WORK=WORK[work], BLOCK=block,
        )  # fmt: skip
    return grad_student


def _tallies(target: Tensor, ignore_index: int | None) -> Tensor:
    """Two counters on the device, 16 bytes apart, which the specialisation of a pointer wants: rows that count, unless
    ``ignore_index`` is None, and rows left to a second launch, none so far."""
    tallies = torch.zeros(8, dtype=torch.int32, device=target.device)
    if target.numel() and ignore_index is not None:
        grid = (triton.cdiv(target.numel(), launch.ROW_BLOCK),)
        sort_kd_count[grid](target, tallies, target.numel(), ignore_index, BLOCK=launch.ROW_BLOCK)
    return tallies


def _reduced(
    kd_rows: Tensor, ce_rows: Tensor, count: Tensor | None, kd_weight: float, ce_weight: float, with_ce: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and terms summed over the rows, in one launch or two, and divided by the count where there is one."""
    N = kd_rows.numel()
    plan = launch.reduction(N)
    options = {"CE": with_ce, "BLOCK": launch.ROW_BLOCK}
    if plan.programs > 1:
        kd_sums, ce_sums = kd_rows.new_empty(plan.programs), kd_rows.new_empty(plan.programs)
        sort_kd_reduce[(plan.programs,)](
            kd_rows, ce_rows, None, kd_sums, ce_sums, None, N, plan.span, kd_weight, ce_weight, LAST=False, **options
        )
        kd_rows, ce_rows, N = kd_sums, ce_sums, plan.programs
        plan = launch.reduction(N)
    loss, kd, ce = (kd_rows.new_empty(()) for _ in range(3))
    sort_kd_reduce[(1,)](
        kd_rows, ce_rows, count, kd, ce, loss, N, plan.span, kd_weight, ce_weight, LAST=True, **options
    )
    return loss, kd, ce


def _row_stride(values: Tensor | None) -> int:
    """The step from row to row of an argument that may be one value for all."""
    return 0 if values is None or values.dim() == 0 else 1


def _power(temperature: float) -> int:
    """T where ``exp(s) = exp(s / T) ** T`` saves an exponential, else 0."""
    return int(temperature) if temperature in (1, 2, 4) else 0
