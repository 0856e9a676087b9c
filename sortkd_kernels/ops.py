"""The op of each backend under one schema, with one fake kernel, and the options of a loss as one tuple."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, backends, checks, reference

BUCKET = checks.TAILS.index("bucket")


class LossConfig(NamedTuple):
    """The options of a loss, the same for every row of a call; `csrc/loss_config.h` is its other spelling.

    Attributes:
        temperature: of every row, where no tensor holds it.
        correction: the place in ``checks.CORRECTIONS``.
        kd_weight, ce_weight: the weights of the two terms.
        alpha, beta: the weights of DKD's terms; KD where ``beta`` is None.
        standardize: LSKD's z-score of both sides.
        tail: the place in ``checks.TAILS``: what stands for the absent classes of a top-k teacher.
        reduction: the place in ``checks.REDUCTIONS``.
        ignore_index: rows with this label take no part.
        parts: the terms and the rank are wanted beside the loss.
    """

    temperature: float = 1.0
    correction: int = 1
    kd_weight: float = 1.0
    alpha: float = 1.0
    beta: float | None = None
    ce_weight: float = 0.0
    standardize: bool = False
    tail: int = 0
    reduction: int = 2
    ignore_index: int = -100
    parts: bool = False

    @property
    def with_ce(self) -> bool:
        return self.parts or self.ce_weight != 0

    def beta_of(self, C: int) -> float:
        """One class beside the label is no distribution to match: without this, NCKD would be the rounding of 0."""
        return self.beta if self.beta is not None and C > 2 else 0.0


_TYPES = {float: "float", int: "int", bool: "bool", float | None: "float?"}
_OPTIONS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(LossConfig).items())
# Logits [..., C] with any strides, row tensors [...]; of a top-k teacher values and indices [..., k], with the bucket
# the rows [..., k + 2] of `bucket_teacher` in place of the values, and then no mean and a rank of 0. The results: loss,
# kd, ce, rank, the student's gradient with the strides of torch.empty_like(student), the temperature's gradient [N]; of
# what is not asked for, an empty tensor.
SCHEMA = (
    "(Tensor student, Tensor teacher, Tensor? teacher_indices, Tensor target, Tensor? temperature_tensor, "
    f"{_OPTIONS}, Tensor? grad_output, bool grad_student, bool grad_temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
SORT_SCHEMA = "(Tensor teacher, Tensor target, int correction, int ignore_index) -> Tensor"


def define(namespace: str, suffix: str = "") -> torch.library.Library:
    """Define a backend's two ops, with their fake kernels; the caller keeps the library, and with it the ops."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, schema, fake in (("sort_kd_forward", SCHEMA, _fake_forward), ("sort_logits", SORT_SCHEMA, _fake_sort)):
        library.define(name + suffix + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}{suffix}", fake, lib=library)
    return library


def arithmetic(*logits: Tensor) -> torch.dtype:
    """The dtype that losses are computed and returned in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def _fake_forward(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor, temperature: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *options, _, grad_student, grad_temperature = arguments
    config, work = LossConfig(*options), arithmetic(student, teacher)
    shape = target.shape if checks.REDUCTIONS[config.reduction] == "none" else ()
    part = shape if config.parts else 0
    return (
        student.new_empty(shape, dtype=work),
        student.new_empty(part, dtype=work),
        student.new_empty(part, dtype=work),
        student.new_empty(target.shape if config.parts else 0, dtype=torch.int32),
        torch.empty_like(student) if grad_student else student.new_empty(0),
        student.new_empty(target.numel() if grad_temperature else 0, dtype=work),
    )


def _fake_sort(teacher: Tensor, target: Tensor, correction: int, ignore_index: int) -> Tensor:
    return torch.empty_like(teacher, memory_format=torch.contiguous_format)


def reference_loss(
    student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor, temperature: Tensor | None,
    row_scale: Tensor | None, config: LossConfig, inplace: bool,
) -> autograd.Parts:  # fmt: skip
    """:func:`reference.loss_rows` as a backend: any layout, arithmetic in float32 or float64, reduced."""
    work, classes, rows = arithmetic(student, teacher), student.shape[-1], target.reshape(-1)
    check_labels("target", rows, classes, config.ignore_index)
    logits, full = student.reshape(-1, classes).to(work), teacher.reshape(-1, teacher.shape[-1]).to(work)
    correction = checks.CORRECTIONS[config.correction]
    scale: Tensor | float = config.temperature
    if temperature is not None:
        scale = temperature.to(work).reshape(-1 if temperature.dim() else ())
    if teacher_indices is not None:
        teacher_indices = teacher_indices.reshape(-1, teacher_indices.shape[-1]).long()
        check_labels("teacher_indices", teacher_indices, classes)
    if config.tail == BUCKET:
        kd, ce = reference.bucket_rows(
            logits, full, teacher_indices, rows, temperature=scale, correction=correction,
            ignore_index=config.ignore_index,
        )  # fmt: skip
        rank = torch.zeros_like(rows, dtype=torch.int32)
    else:
        if teacher_indices is not None:
            uniform = checks.TAILS[config.tail] == "uniform"
            full = reference.densify_top_k(full, teacher_indices, classes, uniform, rows)
        kd, ce, rank = reference.loss_rows(
            logits, full, rows, temperature=scale, correction=correction, alpha=config.alpha, beta=config.beta,
            standardized=config.standardize, ignore_index=config.ignore_index,
        )  # fmt: skip
    weighted = config.kd_weight * kd
    if config.ce_weight:  # 0 * inf is not 0
        weighted = weighted + config.ce_weight * ce
    # The parts have sums of their own: where a weight is 1, torch.compile would make loss and part one detached tensor.
    terms = (x.reshape(target.shape) for x in (weighted, kd.detach(), ce.detach()))
    loss, kd, ce = (_reduced(x, target, row_scale, config) for x in terms)
    return loss, kd, ce, rank.reshape(target.shape)


def _reduced(rows: Tensor, target: Tensor, row_scale: Tensor | None, config: LossConfig) -> Tensor:
    if row_scale is not None:
        return autograd.reduced(rows, row_scale, config)
    reduction = checks.REDUCTIONS[config.reduction]
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (target != config.ignore_index).sum()


def reference_sort_logits(teacher: Tensor, target: Tensor, correction: int, ignore_index: int) -> Tensor:
    """:func:`reference.correct_logits` as a backend."""
    rows, labels = teacher.reshape(-1, teacher.shape[-1]), target.reshape(-1)
    check_labels("target", labels, teacher.shape[-1], ignore_index)
    counts = labels != ignore_index
    corrected = reference.correct_logits(rows, torch.where(counts, labels, 0), checks.CORRECTIONS[correction])
    return torch.where(counts.unsqueeze(-1), corrected, rows).reshape(teacher.shape)


def bucket_teacher(
    backend: str, values: Tensor, indices: Tensor, target: Tensor, classes: int, config: LossConfig, work: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """:func:`reference.bucket_teacher` of rows ``[..., k]``, in ``work`` and corrected by the backend's op."""

    def correct(rows: Tensor, places: Tensor, correction: str) -> Tensor:
        return SORT_LOGITS[backend](rows, places, checks.CORRECTIONS.index(correction), -1)

    correction = checks.CORRECTIONS[config.correction]
    rows, rank = reference.bucket_teacher(
        values.to(work), indices, target, classes, correction, correct, config.parts
    )  # fmt: skip
    return rows, None if rank is None else rank.masked_fill(target == config.ignore_index, 0)


def check_labels(argument: str, labels: Tensor, classes: int, ignore_index: int | None = None) -> None:
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
            f"sortkd_kernels: expected {argument} in [0, {classes}){ignored}, got {int(labels[wrong][0])} in row {row}"
        )


# By backend, all of it in C++ where the tensors have values, and None where they have not: the dispatcher and Python's
# autograd cost more than 64 x 100 logits.
EAGER_LOSS: dict[str, Callable[..., autograd.Parts | None]] = {}
# By backend, `(student, teacher, teacher_indices, target, temperature, row_scale, config, inplace)
# -> (loss, kd, ce, rank)` ...
LOSS: dict[str, Callable[..., autograd.Parts]] = {"reference": reference_loss}
# ... `(teacher, target, correction, ignore_index) -> corrected` ...
SORT_LOGITS: dict[str, Callable[..., Tensor]] = {"reference": reference_sort_logits}
# ... and, of the compiled backends, what makes loss and gradient at once.
KERNELS: dict[str, autograd.Kernels] = {}


def loss(
    backend: str, student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature: Tensor | None, row_scale: Tensor | None, config: LossConfig, inplace: bool,
) -> autograd.Parts:  # fmt: skip
    """``(loss, kd, ce, rank)`` of a backend, by the shortest way that there is."""
    arguments = student, teacher, teacher_indices, target, temperature, row_scale, config, inplace
    eager = None if torch.compiler.is_compiling() else EAGER_LOSS.get(backend)
    return (eager and eager(*arguments)) or LOSS[backend](*arguments)


def register_native(name: str, extension: Any, namespace: str) -> None:
    """Enter a compiled extension, whose kernels are registered in ``namespace``, as a backend."""
    ops = getattr(torch.ops, namespace)
    KERNELS[name] = kernels = autograd.Kernels(ops.sort_kd_forward.default, extension.loss_forward)
    EAGER_LOSS[name] = extension.eager_loss
    LOSS[name], SORT_LOGITS[name] = functools.partial(autograd.loss, kernels), ops.sort_logits.default


_LIBRARIES = [define("sortkd_kernels")]
if backends.available_backends()["native"].available:
    register_native("native", backends.extension(), "sortkd_kernels")

if backends.available_backends()["triton"].available:
    _LIBRARIES.append(define("sortkd_kernels", "_triton"))

    @functools.cache
    def _triton() -> Any:
        """Imported at the first call: it takes half a second, which a CPU user never needs to spend."""
        from .backends import triton

        return triton

    def _triton_forward(
        student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor, temperature: Tensor | None,
        config: LossConfig, *request: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        check_labels("target", target, student.shape[-1], config.ignore_index)
        if teacher_indices is not None:
            check_labels("teacher_indices", teacher_indices, student.shape[-1])
        return _triton().loss_forward(student, teacher, teacher_indices, target, temperature, config, *request)

    def _triton_op(*arguments: Any) -> tuple[Tensor, ...]:
        return _triton_forward(*arguments[:5], LossConfig(*arguments[5:-3]), *arguments[-3:], False, True)

    def _triton_scale(grad: Tensor, grad_output: Tensor) -> Tensor:
        return _triton().scale_gradient(grad, grad_output)

    def _triton_sort_logits(teacher: Tensor, target: Tensor, correction: int, ignore_index: int) -> Tensor:
        check_labels("target", target, teacher.shape[-1], ignore_index)
        return _triton().sort_logits(teacher, target, correction, ignore_index)

    _LIBRARIES[-1].impl("sort_kd_forward_triton", _triton_op, "CompositeExplicitAutograd")
    _LIBRARIES[-1].impl("sort_logits_triton", _triton_sort_logits, "CompositeExplicitAutograd")
    KERNELS["triton"] = autograd.Kernels(
        torch.ops.sortkd_kernels.sort_kd_forward_triton.default, _triton_forward, _triton_scale
    )
    LOSS["triton"] = functools.partial(autograd.loss, KERNELS["triton"])
    SORT_LOGITS["triton"] = torch.ops.sortkd_kernels.sort_logits_triton.default
