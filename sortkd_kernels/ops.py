"""The ops of each backend under one signature, their fake kernels, and the reference wrapped into the same shape.

Signature of a loss op (the C++ schema in `csrc/ops.cpp` is the same):
`(student, teacher, teacher_indices, target, temperature_tensor, temperature, correction, decoupled, kd_weight, alpha,
beta, ce_weight, standardize, uniform_tail, class_dim, reduction, ignore_index, parts, inplace)
-> (loss, kd, ce, rank)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import backends, checks, reference


def reference_loss(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature_tensor: Tensor | None, temperature: float, correction: int, decoupled: bool, kd_weight: float,
    alpha: float, beta: float, ce_weight: float, standardize: bool, uniform_tail: bool, class_dim: int, reduction: int,
    ignore_index: int, parts: bool, inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`reference.loss_rows` as a backend: any layout, arithmetic in float32 or float64, reduced."""
    work = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    classes = student.shape[class_dim]
    rows = target.reshape(-1)
    _check_labels("target", rows, classes, ignore_index)
    if temperature_tensor is not None:
        scale = temperature_tensor.to(work)
        scale = scale.reshape(-1) if scale.dim() else scale
    if teacher_indices is None:
        full = teacher.movedim(class_dim, -1).reshape(-1, classes).to(work)
    else:
        k = teacher.shape[-1]
        _check_labels("teacher_indices", teacher_indices.reshape(-1), classes)
        full = reference.densify_top_k(
            teacher.reshape(-1, k).to(work), teacher_indices.reshape(-1, k), classes, uniform_tail
        )
    kd, ce, rank = reference.loss_rows(
        student.movedim(class_dim, -1).reshape(-1, classes).to(work),
        full,
        rows,
        temperature=temperature if temperature_tensor is None else scale,
        correction=checks.CORRECTIONS[correction],
        decoupled=decoupled,
        alpha=alpha,
        beta=beta,
        standardized=standardize,
        ignore_index=ignore_index,
    )
    weighted = kd_weight * kd + ce_weight * ce if ce_weight else kd_weight * kd  # 0 * inf is not 0
    # The parts have sums of their own: where a weight is 1, torch.compile would make loss and part one detached tensor.
    loss, kd_part, ce_part = (
        reduce_rows(x, rows, reduction, ignore_index, target.shape) for x in (weighted, kd.detach(), ce.detach())
    )
    return loss, kd_part, ce_part, rank.reshape(target.shape)


def reduce_rows(values: Tensor, target: Tensor, reduction: int, ignore_index: int, shape: torch.Size) -> Tensor:
    """Reduce row values ``[N]`` as the loss is reduced: the mean is over the rows that count."""
    if checks.REDUCTIONS[reduction] == "none":
        return values.reshape(shape)
    total = values.sum()
    return total if checks.REDUCTIONS[reduction] == "sum" else total / (target != ignore_index).sum()


def _check_labels(argument: str, labels: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """As the native kernels: on the CPU, where looking at a value costs nothing, a bad label is an IndexError."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        ignored = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise IndexError(
            f"sortkd_kernels: expected {argument} in [0, {classes}){ignored}, got {int(labels[row])} in row {row}"
        )


def reference_sort_logits(teacher: Tensor, target: Tensor, correction: int, ignore_index: int) -> Tensor:
    """:func:`reference.correct_logits` as a backend."""
    rows, labels = teacher.reshape(-1, teacher.shape[-1]), target.reshape(-1)
    _check_labels("target", labels, teacher.shape[-1], ignore_index)
    counts = labels != ignore_index
    corrected = reference.correct_logits(rows, torch.where(counts, labels, 0), checks.CORRECTIONS[correction])
    return torch.where(counts.unsqueeze(-1), corrected, rows).reshape(teacher.shape)


LOSS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {"reference": reference_loss}
LOSS_IN_GRAPH = dict(LOSS)
SORT_LOGITS: dict[str, Callable[..., Tensor]] = {"reference": reference_sort_logits}


def _fake_forward(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature_tensor: Tensor | None, temperature: float, correction: int, decoupled: bool, kd_weight: float,
    alpha: float, beta: float, ce_weight: float, standardize: bool, uniform_tail: bool, class_dim: int, reduction: int,
    ignore_index: int, parts: bool, upstream: Tensor | None, grad_student: bool, grad_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    work = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    shape = target.shape if checks.REDUCTIONS[reduction] == "none" else ()
    part = shape if parts else 0
    return (
        student.new_empty(shape, dtype=work),
        student.new_empty(part, dtype=work),
        student.new_empty(part, dtype=work),
        student.new_empty(target.shape if parts else 0, dtype=torch.int32),
        _like_rows(student, class_dim) if grad_student else student.new_empty(0),
        student.new_empty(target.numel() if grad_temperature else 0, dtype=work),
    )


def _like_rows(student: Tensor, class_dim: int) -> Tensor:
    """The gradient's layout: rows where the student has its classes innermost in memory, contiguous otherwise."""
    moved = student.movedim(class_dim, -1)
    if moved.is_contiguous():
        return torch.empty_like(moved, memory_format=torch.contiguous_format).movedim(-1, class_dim)
    return torch.empty_like(student, memory_format=torch.contiguous_format)


if backends.available_backends()["native"].available:
    torch.library.register_fake("sortkd_kernels::sort_kd_forward")(_fake_forward)
    torch.library.register_fake("sortkd_kernels::sort_logits")(
        lambda teacher, target, correction, ignore_index: torch.empty_like(
            teacher, memory_format=torch.contiguous_format
        )
    )

    # The op for a graph; outside of one the same without the dispatcher's argument parser.
    LOSS_IN_GRAPH["native"] = torch.ops.sortkd_kernels.sort_kd_loss.default
    LOSS["native"] = backends.extension().sort_kd_loss
    SORT_LOGITS["native"] = torch.ops.sortkd_kernels.sort_logits.default

if backends.available_backends()["triton"].available:
    # Imported at the first call: triton takes half a second, which a CPU user never needs to spend.
    def _triton_loss(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from . import triton_ops

        return triton_ops.loss(*arguments)

    def _triton_sort_logits(*arguments: object) -> Tensor:
        from . import triton_ops

        return triton_ops.sort_logits(*arguments)

    LOSS["triton"] = LOSS_IN_GRAPH["triton"] = _triton_loss
    SORT_LOGITS["triton"] = _triton_sort_logits
