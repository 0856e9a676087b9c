"""The backend's functions: look the plan up, allocate what the call returns, launch. Nothing is read back."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import choices
from .row_io import COUNT_LABELS, COUNTERS, MAX_GROUPS, SUM_COUNTS

UNIFORM, BUCKET = 1, 2  # places in TAILS of `checks.py`

# Counters that each call leaves at zero, by device, stream and thread: a call's launches on one stream may have another
# thread's between them.
_TICKETS: dict[tuple[int | None, int, int], Tensor] = {}
# For captured calls, whose graph may be replayed on any stream: each has counters that no other call uses.
_SPARE: dict[int | None, list[Tensor]] = {}
_BLOCKS: list[Tensor] = []  # what the counters lie in is never given back: a graph does not hold its tensors


def _on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run on the device of the first argument: Triton launches on the current one, whatever its tensors are on."""

    @functools.wraps(function)
    def wrapper(first: Tensor, *arguments: Any, **keywords: Any) -> Any:
        index = first.device.index
        if index is None or index == torch.cuda.current_device():
            return function(first, *arguments, **keywords)
        with torch.cuda.device(index):
            return function(first, *arguments, **keywords)

    return wrapper


@_on_device_of_first
def loss_forward(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature_tensor: Tensor | None, config: Any, grad_output: Tensor | None, grad_student: bool,
    grad_temperature: bool, inplace: bool = False, traced: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of :func:`sortkd_kernels.reference.loss_rows`, reduced, and its gradients.

    Args:
        student, teacher: logits ``[..., C]`` of any strides; a top-k teacher's values ``[..., k]``, with the bucket
            its rows ``[..., k + 2]`` (`reference.py`), where the loss has no mean.
        teacher_indices: the classes of these values, or None.
        target: labels ``[...]``.
        temperature_tensor: 0-d or one value a row; takes the place of ``config.temperature``.
        config: the options of the call, a `LossConfig`.
        grad_output: the gradient that reaches the loss, a scalar or one value a row; None stands for 1. It multiplies
            in the working precision, before the gradient's one rounding.
        grad_student, grad_temperature: which gradients to make.
        inplace: write the student's gradient over ``student``.
        traced: called from a graph of torch.compile's, in whose memory nothing may stay.

    Returns:
        ``loss, kd, ce, rank, grad_student, grad_temperature``; what is not asked for has shape ``[0]``.
        ``grad_student`` has the strides of ``torch.empty_like(student)``, ``grad_temperature`` one value a row.
    """
    if config.tail == BUCKET:
        return _bucket_loss(
            student, teacher, teacher_indices, target, temperature_tensor, config, grad_output, grad_student,
            grad_temperature, inplace,
        )  # fmt: skip
    device = student.device
    C, N, k = student.shape[-1], target.numel(), 0
    if teacher_indices is not None:
        k = teacher.shape[-1]
        teacher, teacher_indices = teacher.contiguous(), teacher_indices.contiguous()
    work = choices.arithmetic(student.dtype, teacher.dtype)
    reduction, parts, new = config.reduction, config.parts, student.new_empty
    shape = target.shape if reduction == 0 else ()
    gradient = new(0)
    if grad_student:
        gradient = student if inplace else torch.empty_like(student)
    written = gradient if grad_student else student
    general = temperature_tensor is not None or config.standardize or work == torch.float64
    ce = -1 if general or (config.with_ce and config.temperature not in (1, 2, 4)) else 0
    if config.with_ce and not ce:
        ce = int(config.temperature)
    plan = choices.plan(
        student.shape, (student.stride(), teacher.stride(), written.stride()),
        (student.dtype, teacher.dtype), k,
        None if teacher_indices is None else teacher_indices.dtype, ce, general, config.correction, reduction == 2,
        (student.data_ptr() % 16 == 0, teacher.data_ptr() % 16 == 0, written.data_ptr() % 16 == 0), device,
    ) if N else None  # fmt: skip
    if N and plan is None:  # no two strides walk these rows
        *results, made, by_temperature = loss_forward(
            student.contiguous(), teacher.contiguous(), teacher_indices, target, temperature_tensor, config,
            grad_output, grad_student, grad_temperature, traced=traced,
        )  # fmt: skip
        return *results, gradient.copy_(made) if grad_student else made, by_temperature

    loss = new(shape, dtype=work)
    kd, cross_entropy = (new(shape if parts else 0, dtype=work) for _ in range(2))
    rank = new(target.shape if parts else 0, dtype=torch.int32)
    by_temperature = new(N if grad_temperature else 0, dtype=work)
    results = loss, kd, cross_entropy, rank, gradient, by_temperature
    if plan is None:
        for value in results[: 3 if parts else 1]:
            value.fill_(math.nan if reduction == 2 else 0.0)
        return results
    tickets = _tickets(device, traced)
    slots, counts, ranks, mean = loss, tickets, rank, 0
    if reduction:
        slots = new((2 if ce else 1) * N + 2 * MAX_GROUPS.value, dtype=work)
    if plan.listed is not None and not parts:
        ranks = new(N, dtype=torch.int32)
    target = target.contiguous()
    if reduction == 2:
        mean = COUNT_LABELS.value
        if plan.count is not None:
            mean, counts = SUM_COUNTS.value, new(COUNTERS.value, dtype=torch.int32)
            plan.count((target, counts), (N, config.ignore_index))
    # A pointer that a kernel does not use is one of the right dtype: another would be another kernel.
    pointers = (
        student, teacher, target, loss if temperature_tensor is None else temperature_tensor.to(work).contiguous(),
        loss if grad_output is None else grad_output.to(work).contiguous(), written,
        by_temperature, loss, kd, cross_entropy, ranks, slots, tickets, counts,
    )  # fmt: skip
    decoupled = config.beta is not None
    rows = plan.rows
    numbers = (
        N, rows.inner, *rows.strides, _row_stride(temperature_tensor), _row_stride(grad_output), config.ignore_index,
        max(choices.GROUP_BITS, (-(-N // MAX_GROUPS.value) - 1).bit_length()), reduction, mean, int(parts),
        int(parts or plan.listed is not None), int(grad_student), int(grad_temperature), config.correction,
        plan.max_rank, int(decoupled), int(config.standardize), config.temperature, config.kd_weight,
        config.alpha if decoupled else 1.0, config.beta_of(C) if decoupled else 0.0, config.ce_weight,
    )  # fmt: skip
    calls = []  # all memory is there before the first one counts
    for launch, scratch in zip((plan.first, plan.listed), plan.scratch, strict=True):
        if launch is None:
            continue
        if scratch is None:
            calls.append((launch, pointers, numbers))
            continue
        keys = new(scratch.keys, dtype=torch.int64)
        dense = new(scratch.dense, dtype=work) if k else loss
        more = teacher_indices if k else keys, keys, dense
        of_rows = C, k, int(config.tail == UNIFORM), scratch.capacity
        calls.append((launch, (*pointers, *more), (*numbers, *of_rows)))
    try:
        for launch, given, settings in calls:
            launch(given, settings)
    except BaseException:
        _TICKETS.clear()  # what has been launched counts on what has not
        raise
    return results


def _bucket_loss(
    student: Tensor, teacher: Tensor, indices: Tensor, target: Tensor, temperature: Tensor | None, config: Any,
    grad_output: Tensor | None, grad_student: bool, grad_temperature: bool, inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`loss_forward` of a teacher with the bucket: the rows one by one, their sum by torch."""
    C, N, k, parts, new = student.shape[-1], target.numel(), indices.shape[-1], config.parts, student.new_empty
    work = choices.arithmetic(student.dtype, teacher.dtype)
    logits = student.contiguous()
    gradient = logits if inplace else torch.empty_like(logits) if grad_student else student.new_empty(0)
    loss = new(target.shape, dtype=work)
    kd, ce = (new(target.shape if parts else 0, dtype=work) for _ in range(2))
    rank = new(target.shape if parts else 0, dtype=torch.int32)
    by_temperature = new(N if grad_temperature else 0, dtype=work)
    if N:
        written = gradient if grad_student else logits
        aligned = logits.data_ptr() % 16 == 0, written.data_ptr() % 16 == 0
        dtypes = student.dtype, teacher.dtype, indices.dtype
        launch, programs = choices.bucket(N, C, k, dtypes, aligned, student.device)
        marks = torch.zeros(programs * C, dtype=torch.int8, device=student.device)
        launch(
            (
                logits, teacher.contiguous(), indices.contiguous(), target.contiguous(),
                loss if temperature is None else temperature.to(work).contiguous(),
                loss if grad_output is None else grad_output.to(work).contiguous(), written,
                by_temperature, loss, kd, ce, rank, marks,
            ),
            (
                N, C, k, _row_stride(temperature), _row_stride(grad_output), config.ignore_index, int(parts),
                int(grad_student), int(grad_temperature), int(config.correction != 0), config.temperature,
                config.kd_weight, config.ce_weight,
            ),
        )  # fmt: skip
    if config.reduction:
        loss, kd, ce = (x.sum() if x is loss or parts else x for x in (loss, kd, ce))
    if grad_student and not inplace and not student.is_contiguous():
        gradient = torch.empty_like(student).copy_(gradient)
    return loss, kd, ce, rank, gradient, by_temperature


@_on_device_of_first
def scale_gradient(grad_student: Tensor, grad_output: Tensor) -> Tensor:
    """Multiply a gradient in place by a scalar, 1 of which costs no traffic, or by one value a row.

    Args:
        grad_student: a gradient that :func:`loss_forward` made, ``[..., C]``.
        grad_output: 0-d, or one value a row ``[...]``.
    """
    if grad_output.dim() or not grad_student.numel():
        return grad_student.mul_(grad_output.unsqueeze(-1))
    device, total = grad_student.device, grad_student.numel()
    launch = choices.scale(total, (grad_student.dtype, grad_output.dtype), grad_student.data_ptr() % 16 == 0, device)
    launch((grad_student, grad_output), (total,))
    return grad_student


@_on_device_of_first
def sort_logits(teacher: Tensor, target: Tensor, correction: int, ignore_index: int) -> Tensor:
    """:func:`sortkd_kernels.reference.correct_logits` along the last dimension, in a new contiguous tensor.

    Args:
        teacher: logits ``[..., C]``.
        target: labels ``[...]``; rows of ``ignore_index`` are returned as they are.
        correction: 0 none, 1 sort, 2 swap.
    """
    device = teacher.device
    N, C = target.numel(), teacher.shape[-1]
    corrected = torch.empty_like(teacher, memory_format=torch.contiguous_format)
    if not N:
        return corrected
    logits = teacher.reshape(N, C)
    rank = torch.empty(N, dtype=torch.int32, device=device)
    for listed in (False, True)[: 1 + (correction != 0 and choices.COUNTED.value < C - 1)]:
        aligned = logits.data_ptr() % 16 == 0
        launch, scratch = choices.logits_plan(N, C, logits.stride(), teacher.dtype, listed, aligned, device)
        keys = torch.empty(scratch.keys, dtype=torch.int64, device=device)
        launch(
            (logits, target.contiguous(), corrected, rank, keys),
            (N, C, *logits.stride(), ignore_index, correction, choices.COUNTED.value, scratch.capacity),
        )
    return corrected


def _tickets(device: torch.device, traced: bool) -> Tensor:
    """Zeroed counters for a call on the current stream."""
    index, stream = device.index, 0
    spare = _SPARE.setdefault(index, [])
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if traced or (captured and not spare):
        return torch.zeros(1 + MAX_GROUPS.value, dtype=torch.int32, device=device)
    if captured:
        return spare.pop()
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(index)
    key = index, stream, threading.get_ident()
    tickets = _TICKETS.get(key)
    if tickets is None or not spare:
        # Zeroed on the stream that counts with them.
        block = torch.zeros(64, 1 + MAX_GROUPS.value, dtype=torch.int32, device=device)
        _BLOCKS.append(block)
        own, *others = block
        spare.extend(others)
        tickets = _TICKETS.setdefault(key, own)
    return tickets


def _row_stride(values: Tensor | None) -> int:
    """The step from row to row of an argument that may be one value for all, or -1 where there is none."""
    return -1 if values is None else min(values.dim(), 1)
