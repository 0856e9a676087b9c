"""The loss and its gradient in one pass: shapes and pointers in, kernels launched, nothing read back."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .layout import alignment, as_rows, check_labels, gradient_like, inner_size
from .reduce import sort_kd_count, sort_kd_reduce, sort_kd_scale
from .stream import sort_kd_stream
from .tile import sort_kd_tile

NONE, SORT, SWAP = range(3)
ROWS, SUM, MEAN = range(3)
WORK = {torch.float32: tl.float32, torch.float64: tl.float64}


@launch.on_device_of_first
def loss_forward(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature_tensor: Tensor | None, temperature: float, correction: int, decoupled: bool, kd_weight: float,
    alpha: float, beta: float, ce_weight: float, standardize: bool, uniform_tail: bool, class_dim: int, reduction: int,
    ignore_index: int, parts: bool, grad_loss: Tensor | None, with_grad: bool, inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of :func:`sortkd_kernels.reference.loss_rows`, reduced, and its gradient.

    Args:
        teacher_indices: the classes of ``teacher``'s values where it is a top-k teacher; all others hold -inf, or with
            ``uniform_tail``, for values that are log-probabilities, an equal share of what they leave of 1.
        temperature_tensor: 0-d or one value a row; takes the place of ``temperature``.
        correction: 0 none, 1 sort, 2 swap.
        reduction: 0 none, 1 sum, 2 mean over the rows that count.
        grad_loss: the gradient that reaches the loss, a scalar or one value a row; None stands for 1. It multiplies in
            the working precision, before the gradient's one rounding.
        with_grad: whether to make the gradients; without, no tensor of the student's size is allocated.
        inplace: write the student's gradient over ``student``, which must be contiguous.

    Returns:
        ``loss, kd, ce, rank, grad_student, grad_temperature``. The gradients are empty where they are not asked for;
        ``grad_temperature`` has one value a row, in ``target``'s shape.
    """
    N, C, device = target.numel(), student.shape[class_dim], student.device
    check_labels("target", target, C, ignore_index)
    if teacher_indices is not None:
        check_labels("teacher_indices", teacher_indices, C)
    work = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    with_ce = parts or ce_weight != 0
    learned = with_grad and temperature_tensor is not None
    target = target.contiguous()

    def new(shape: Any, dtype: torch.dtype = work) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    kd_rows, ce_rows = new(target.shape), new(target.shape)
    rank = new(target.shape, torch.int32)
    loss_rows = new(target.shape) if reduction == ROWS else None
    grad_student = new(0, student.dtype)
    if with_grad:
        grad_student = student if inplace else gradient_like(student, class_dim)
    grad_temperature = new(target.shape if learned else 0)
    top_k = teacher_indices is not None
    on_chip = not top_k and launch.on_chip(C, work, standardize or learned)
    settled = launch.SHALLOW_RANK if on_chip else launch.RUN
    # What a launch leaves to the next: ranks over its limit, which no label can have where the classes are few. A tile
    # swaps at any rank.
    leftovers = settled < C - 1 and (correction == SORT or (correction == SWAP and not on_chip))
    tallies = _tallies(target, ignore_index if reduction == MEAN else None)
    count = tallies[:1] if reduction == MEAN else None
    left = (new(N, torch.int32), tallies[4:]) if leftovers else (None, None)

    inner = inner_size(student, class_dim)
    s, t = as_rows(student, class_dim), as_rows(teacher.contiguous() if top_k else teacher, class_dim)
    g = as_rows(grad_student, class_dim) if with_grad else s
    if inner == 1 and s.classes != 1:  # a matrix in columns: its rows are neighbours as those of [N, C, H, W] are
        inner, s, t, g = N, s.turned(), t.turned(), g.turned()
    arguments = (
        s.data, t.data, target, None if temperature_tensor is None else temperature_tensor.contiguous(),
        None if grad_loss is None else grad_loss.contiguous(), count,
        kd_rows, ce_rows, loss_rows, rank, grad_student if with_grad else None, grad_temperature,
        N, C, inner, s.outer, s.inner, s.classes, t.outer, t.inner, t.classes,
        g.outer, g.inner, g.classes,
        _row_stride(temperature_tensor), _row_stride(grad_loss), ignore_index,
        float(temperature), float(kd_weight), float(alpha), float(beta), float(ce_weight),
    )  # fmt: skip
    flags = {
        "CORRECTION": correction, "DECOUPLED": decoupled, "STANDARDIZE": standardize, "LEARNED": learned,
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
                teacher.shape[class_dim], first_row, **flags, **plan.options, LEFT=second,
                MERGE=plan.capacity > plan.run, BUFFERS=plan.buffers, STRIDE_ROWS=plan.stride_rows,
                UNIFORM=uniform_tail, RUN=plan.run, B=plan.block,
            )  # fmt: skip
    if reduction == ROWS:
        ce = ce_rows if with_ce else torch.zeros_like(ce_rows)
        return loss_rows, kd_rows, ce, rank, grad_student, grad_temperature
    loss, kd, ce = _reduced(kd_rows, ce_rows, count, float(kd_weight), float(ce_weight), with_ce)
    return loss, kd, ce, rank, grad_student, grad_temperature


@launch.on_device_of_first
def scale_gradient(grad_student: Tensor, grad_loss: Tensor, class_dim: int) -> Tensor:
    """Multiply a gradient in place by a scalar or by one value a row; a scalar 1 costs no memory traffic.

    Args:
        grad_student: a gradient that :func:`loss_forward` made, in its layout.
        grad_loss: 0-d, or one value a row, of the target's shape.
        class_dim: the dimension of the classes.
    """
    total, inner = grad_student.numel(), inner_size(grad_student, class_dim)
    if grad_student.stride(class_dim) == 1:
        inner = 1  # class after class, so row after row
    if total:
        work = torch.float64 if grad_student.dtype == torch.float64 else torch.float32
        block = 4 * launch.ROW_BLOCK
        sort_kd_scale[(triton.cdiv(total, block),)](
            grad_student, grad_loss.contiguous(), total, grad_student.shape[class_dim] * inner, inner,
            ONE=grad_loss.dim() == 0, WORK=WORK[work], BLOCK=block,
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
