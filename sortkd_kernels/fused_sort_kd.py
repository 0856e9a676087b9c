"""The functional API: check the arguments, choose a backend, call its one op.

The mathematics, and the reasons for it, are in :mod:`sortkd_kernels.reference`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, backends, checks, ops, ranks, vocab_parallel

_REDUCTION = {name: code for code, name in enumerate(checks.REDUCTIONS)} | {
    "batchmean": checks.REDUCTIONS.index("mean")
}


class SortKDOutput(NamedTuple):
    """What a loss function returns with ``return_parts=True``.

    Attributes:
        loss: the weighted loss, reduced; the only part with a gradient.
        kd: the distillation term without ``kd_weight``, reduced in the same way, detached.
        ce: the cross-entropy without its weight, reduced in the same way, detached.
        rank: the number of classes that the teacher put above the label, int32, of ``target``'s shape; 0 where the
            teacher was right and in ignored rows. ``(rank > 0).float().mean()`` is the share of corrected rows.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    rank: Tensor


class SortKDTopKOutput(NamedTuple):
    """What :func:`fused_sort_kd_topk` returns with ``return_parts=True``: :class:`SortKDOutput` and two masses.

    Attributes:
        loss, kd, ce, rank: as in :class:`SortKDOutput`.
        student_mass: the student's probability, at temperature 1, of the k classes together, of ``target``'s shape.
        teacher_mass: ``sum exp(values)``, the same of a teacher whose values are log-probabilities.

    Both are detached, count a class once, and are 0 in ignored rows.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    rank: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


def fused_sort_kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    correction: str = "sort",
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    standardize: bool = False,
    class_dim: int = -1,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str | None = None,
    return_parts: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor | SortKDOutput:
    r"""Knowledge distillation from a teacher corrected by the label, in one pass over the logits.

    The loss of a row is ``kd_weight * T^2 * KL(softmax(t'/T) || softmax(s/T)) + ce_weight * CE(s, y)`` with ``t'`` the
    teacher's row after the correction (Sort-KD, arXiv 2508.16544). The gradient goes to the student, and to
    ``temperature`` where it is a tensor with ``requires_grad``.

    Under ``torch.compile`` every new value of a float argument is a new graph: give a temperature that changes as a
    tensor, and apply a weight that changes every epoch to the returned loss.

    Args:
        student: logits ``[..., C]``, float32, float64, bfloat16 or float16.
        teacher: logits of the same shape, any of these dtypes, without ``requires_grad``.
        target: labels ``[...]``, int64 in ``[0, C)`` or ``ignore_index``.
        temperature: a positive float; or a tensor, 0-d or one value for each row (CTKD).
        correction: ``"sort"``, ``"swap"`` (exchange the largest logit with the label's) or ``"none"`` (plain KD).
        ce_weight: weight of the cross-entropy on the student's own logits.
        kd_weight: weight of the distillation term.
        standardize: replace both sides' logits by their z-score over the classes (LSKD).
        class_dim: the dimension of the classes; 1 takes ``[N, C, H, W]`` logits with ``[N, H, W]`` labels.
        reduction: ``"mean"`` over the rows that count (``"batchmean"`` is another name of it), ``"sum"``, ``"none"``.
        denominator: what a ``"sum"`` is divided by, a number or a 0-d tensor: tokens of all micro-batches and ranks.
        row_weight: multiplies each row's loss, ``[...]``; a mean divides by the count of the rows all the same.
        ignore_index: rows with this label have loss 0, gradient 0 and do not count in the mean.
        inplace: may write the gradient over ``student``; do not read it afterwards. The
            reference backend, and any backend under ``torch.compile`` or with the student as its own teacher, allocate
            a gradient all the same.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the device's default.
        return_parts: return :class:`SortKDOutput` instead of the loss.
        process_group: the classes are spread over the ranks of this group: ``student`` and ``teacher`` are this rank's
            ``[..., C_r]``, consecutive slices in the order of the ranks and of any widths, the labels are among all
            classes, and everything but the logits is the same on all ranks. So are the results; the gradient is the
            slice's. Logits that are DTensors sharded over their classes need no ``process_group``. Every rank makes
            the call, and the backward pass; it is plain PyTorch, on any device (``backend=None``), and a graph break
            under ``torch.compile``.

    Returns:
        The loss, float32 (float64 where an input is float64), a scalar or of ``target``'s shape for ``"none"``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.
        IndexError: on the CPU, or with ``process_group``, a label outside ``[0, C)`` that is not ``ignore_index``.
        RuntimeError: the ``backend`` asked for is not available; the message has the reason.
    """
    options = _options("fused_sort_kd", temperature, correction, kd_weight, 1.0, None, ce_weight, standardize, 0,
                       reduction, ignore_index, return_parts)  # fmt: skip
    return _loss("fused_sort_kd", student, teacher, None, target, temperature, options, class_dim, denominator,
                 row_weight, inplace, backend, process_group)  # fmt: skip


def fused_sort_dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    correction: str = "sort",
    standardize: bool = False,
    class_dim: int = -1,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str | None = None,
    return_parts: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor | SortKDOutput:
    r"""Decoupled knowledge distillation (DKD, arXiv 2203.08679, equation 7) from the corrected teacher, in one pass.

    The loss of a row is ``kd_weight * (alpha * TCKD + beta * NCKD) + ce_weight * CE(s, y)``, both terms with ``T^2``.
    Everything is computed in log space from sums without the label, so the gradient is finite where the student's
    probability of the label rounds to 1. With two classes NCKD is 0.

    Args:
        alpha: weight of the target-class term.
        beta: weight of the non-target-class term; the recipes have one for each pair of models.
        kd_weight: the warm-up factor of the recipes, ``min(epoch / warmup, 1)``.

    The other arguments are those of :func:`fused_sort_kd`.

    Returns:
        As :func:`fused_sort_kd`; the part ``kd`` is ``alpha * TCKD + beta * NCKD``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in :func:`fused_sort_kd`.
    """
    checks.as_float("fused_sort_dkd", "beta", beta)  # None would be KD
    options = _options("fused_sort_dkd", temperature, correction, kd_weight, alpha, beta, ce_weight, standardize, 0,
                       reduction, ignore_index, return_parts)  # fmt: skip
    return _loss("fused_sort_dkd", student, teacher, None, target, temperature, options, class_dim, denominator,
                 row_weight, inplace, backend, process_group)  # fmt: skip


def fused_sort_kd_topk(
    student: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    tail: str = "renormalize",
    correction: str = "sort",
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str | None = None,
    return_parts: bool = False,
) -> Tensor | SortKDTopKOutput:
    r"""Sort-KD from a teacher served as its top ``k`` classes: the teacher's memory is ``k`` values a row, not ``C``.

    The k values and indices stand for a full row of ``C`` logits, and the loss is exactly :func:`fused_sort_kd` of that
    row; with ``k = C`` they are the same call. What the absent classes hold is ``tail``:

    * ``"renormalize"``: ``-inf``. The teacher's distribution lives on k classes alone, renormalised there.
    * ``"uniform"``: the values are log-probabilities at temperature 1, and the mass that they leave,
      ``1 - sum exp(values)``, is spread evenly over the ``C - k`` absent classes.
    * ``"bucket"``: the values are log-probabilities at temperature 1, and the absent classes are one class with the
      mass that they leave, on the student's side too: KD is that of these ``k + 1`` classes, whose distributions are
      formed at temperature 1 and then tempered.

    A label that is not among the k ranks below all of them. The correction then gives it the largest value, gives each
    of the k the next lower one, and leaves the last of them with what an absent class holds. The student's softmax runs
    over all ``C`` classes, and so does the cross-entropy, whatever the tail.

    The bucket is never above the label: where the label is among the k, only they are ordered. A label outside of them
    holds, as with ``"uniform"``, an even share of what is left; once corrected it is a class of its own, and the bucket
    keeps the shares of the other absent classes (so KD is that of ``"uniform"`` with the classes merged that hold a
    share after the correction). With ``correction="none"`` it stays in the bucket, and KD does not depend on the label.

    A server may append the label's own value as one more entry, whether or not it is among the k already: of several
    entries of the label the first one counts. Other classes must not come twice.

    Args:
        student: logits ``[..., C]``.
        teacher_values: the teacher's k largest logits (or log-probabilities) a row, ``[..., k]``, in any order.
        teacher_indices: their classes, int64 or int32 ``[..., k]``, distinct within a row but for the label.
        target: labels ``[...]``.
        tail: ``"renormalize"``, ``"uniform"`` or ``"bucket"``.
        return_parts: return :class:`SortKDTopKOutput` instead of the loss; it reads the student once more.

    The other arguments are those of :func:`fused_sort_kd`.

    Returns:
        As :func:`fused_sort_kd`; ``rank`` counts the classes among the k (and the tail) above the label.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`fused_sort_kd`.
        IndexError: on the CPU, a label or an index outside ``[0, C)``.
    """
    fn = "fused_sort_kd_topk"
    checks.check_choice(fn, "tail", tail, checks.TAILS)
    options = _options(fn, temperature, correction, kd_weight, 1.0, None, ce_weight, False, checks.TAILS.index(tail),
                       reduction, ignore_index, return_parts)  # fmt: skip
    arguments = fn, student, teacher_values, teacher_indices, target
    if not options.parts:
        return _loss(*arguments, temperature, options, -1, denominator, row_weight, inplace, backend)
    masses = _masses(*arguments, options, backend)  # before the student may be written over
    return SortKDTopKOutput(
        *_loss(*arguments, temperature, options, -1, denominator, row_weight, inplace, backend), *masses
    )


@torch.no_grad()
def _masses(
    fn: str, student: Tensor, values: Tensor, indices: Tensor, target: Tensor, config: ops.LossConfig,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What student and teacher give to the k, at temperature 1.

    The student's normaliser is a cross-entropy: that of the largest of its logits at the k.
    """
    checks.check_logits(fn, "student", student)
    checks.check_top_k(fn, student, values, indices)
    checks.check_target(fn, "student", student, target)
    ops.check_labels("teacher_indices", indices, student.shape[-1])
    work = ops.arithmetic(student, values)
    is_label = indices == target.unsqueeze(-1)
    later = is_label & (is_label.cumsum(-1) > 1)
    classes, ignored = indices.long(), target == config.ignore_index
    of_k = student.gather(-1, classes).to(work).masked_fill(later, -torch.inf)
    top, place = of_k.max(-1, keepdim=True)
    config = ops.LossConfig(correction=0, reduction=0, ignore_index=-1, parts=True)
    at_top = classes.gather(-1, place).squeeze(-1).masked_fill(ignored, -1)
    normaliser = _loss(fn, student, values, indices, at_top, 1.0, config, -1, None, None, False, backend)
    of_student = (of_k - top).exp().sum(-1) * (-normaliser.ce).exp()
    of_student = of_student.masked_fill(top.squeeze(-1) == -torch.inf, 0.0)
    of_teacher = values.to(work).exp().masked_fill(later, 0.0).sum(-1)
    return of_student.masked_fill(ignored, 0.0), of_teacher.masked_fill(ignored, 0.0)


def sort_logits(
    teacher: Tensor,
    target: Tensor,
    *,
    correction: str = "sort",
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """The corrected teacher alone, to put before any other logit-based loss.

    Args:
        teacher: logits ``[..., C]`` without ``requires_grad``.
        target: labels ``[...]``, int64; rows of ``ignore_index`` are returned as they are.
        correction, ignore_index, backend: as in :func:`fused_sort_kd`.

    Returns:
        A new tensor of ``teacher``'s shape and dtype; a row with a NaN is all NaN.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as in :func:`fused_sort_kd`.
    """
    fn = "sort_logits"
    checks.check_logits(fn, "teacher", teacher)
    checks.check_frozen(fn, "teacher", teacher)
    checks.check_target(fn, "teacher", teacher, target)
    checks.check_choice(fn, "correction", correction, checks.CORRECTIONS)
    ignore_index = checks.as_int(fn, "ignore_index", ignore_index)
    op = ops.SORT_LOGITS[backends.choose(fn, backend, teacher.device)]
    return op(teacher, target, checks.CORRECTIONS.index(correction), ignore_index)


def _loss(
    fn: str, student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature: float | Tensor, config: ops.LossConfig, class_dim: int, denominator: float | Tensor | None,
    row_weight: Tensor | None, inplace: bool, backend: str | None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor | SortKDOutput:  # fmt: skip
    """Every public loss: check the tensors, view them with their classes last, call the backend."""
    if process_group is not None or ranks.is_sharded(student):
        if teacher_indices is not None:
            raise ValueError(f"{fn}: expected logits of all classes beside a teacher's top k, got a DTensor")
        over_ranks = torch.compiler.disable(_loss_over_ranks) if torch.compiler.is_compiling() else _loss_over_ranks
        return over_ranks(fn, student, teacher, target, temperature, config, class_dim, denominator, row_weight,
                          inplace, backend, process_group)  # fmt: skip
    learned, row_scale, config, inplace = _checked(
        fn, student, teacher, teacher_indices, target, temperature, config, class_dim, denominator, row_weight, inplace
    )
    if class_dim != -1:
        student, teacher = student.movedim(class_dim, -1), teacher.movedim(class_dim, -1)
    name = backends.choose(fn, backend, student.device)
    rank = None
    if config.tail == ops.BUCKET:
        work = ops.arithmetic(student, teacher)
        teacher, rank = ops.bucket_teacher(name, teacher, teacher_indices, target, student.shape[-1], config, work)
    parts = ops.loss(name, student, teacher, teacher_indices, target, learned, row_scale, config, inplace)
    if not config.parts:
        return parts[0]
    return SortKDOutput(*parts[:3], parts[3] if rank is None else rank)


def _loss_over_ranks(
    fn: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float | Tensor, config: ops.LossConfig,
    class_dim: int, denominator: float | Tensor | None, row_weight: Tensor | None, inplace: bool, backend: str | None,
    process_group: torch.distributed.ProcessGroup | None,
) -> Tensor | SortKDOutput:  # fmt: skip
    """The same for logits whose classes are spread over the ranks of a group."""
    inplace = inplace and process_group is not None  # the memory of a DTensor is its own
    group, student, teacher, target = ranks.shards(fn, student, teacher, target, process_group, class_dim)
    try:
        if backend is not None:
            raise ValueError(f"{fn}: expected backend=None for classes over several ranks, got {backend!r}")
        learned, row_scale, config, inplace = _checked(
            fn, student, teacher, None, target, temperature, config, class_dim, denominator, row_weight, inplace, True
        )
        if class_dim not in (-1, student.dim() - 1):
            raise ValueError(f"{fn}: expected class_dim=-1 for classes over several ranks, got {class_dim}")
    except (TypeError, ValueError):
        ranks.refuse(group, student)
        raise
    kernels = vocab_parallel.kernels(group)
    parts = autograd.loss(kernels, student, teacher, None, target, learned, row_scale, config, inplace)
    return SortKDOutput(*parts) if config.parts else parts[0]


def _checked(
    fn: str, student: Tensor, teacher: Tensor, teacher_indices: Tensor | None, target: Tensor,
    temperature: float | Tensor, config: ops.LossConfig, class_dim: int, denominator: float | Tensor | None,
    row_weight: Tensor | None, inplace: bool, slices: bool = False,
) -> tuple[Tensor | None, Tensor | None, ops.LossConfig, bool]:  # fmt: skip
    """A learned temperature, the rows' scale, the options that are left and whether to write in place."""
    checks.check_logits(fn, "student", student)
    if teacher_indices is None:
        checks.check_teacher(fn, student, teacher)
    else:
        checks.check_top_k(fn, student, teacher, teacher_indices)
    checks.check_target(fn, "student", student, target, class_dim, slices)
    learned = temperature if isinstance(temperature, Tensor) else None
    if learned is not None:
        checks.check_temperature_tensor(fn, learned, student, target)
    row_scale = None
    if denominator is not None or row_weight is not None or config.tail == ops.BUCKET:
        row_scale, config = _row_scale(fn, student, teacher, target, config, denominator, row_weight)
    inplace = inplace and checks.allows_inplace(fn, student, teacher)
    return learned, row_scale, config, inplace


def _row_scale(
    fn: str, student: Tensor, teacher: Tensor, target: Tensor, config: ops.LossConfig,
    denominator: float | Tensor | None, row_weight: Tensor | None,
) -> tuple[Tensor, ops.LossConfig]:  # fmt: skip
    """What multiplies the loss of each row, and the options of the reduction that is left: a sum, or none."""
    work = ops.arithmetic(student, teacher)
    scale = torch.ones((), dtype=work, device=student.device)
    if row_weight is not None:
        checks.check_row_weight(fn, row_weight, student, target)
        scale = row_weight.to(work)
    reduction = checks.REDUCTIONS[config.reduction]
    if denominator is not None:
        checks.check_denominator(fn, denominator, student, reduction)
        scale = scale / denominator
    if reduction == "mean":
        scale, reduction = scale / (target != config.ignore_index).sum(), "sum"
    return scale.to(work), config._replace(reduction=checks.REDUCTIONS.index(reduction))


def _options(fn: str, temperature: float | Tensor, correction: str, *others: Any) -> ops.LossConfig:
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    if torch.compiler.is_compiling():
        return _checked_options(fn, number, correction, *others)
    try:
        return _remembered_options(fn, number, correction, *others)
    except TypeError:  # of an argument that cannot be hashed, the checks have better words
        return _checked_options(fn, number, correction, *others)


def _checked_options(
    fn: str, temperature: float, correction: str, kd_weight: float, alpha: float, beta: float | None, ce_weight: float,
    standardize: bool, tail: int, reduction: str, ignore_index: int, parts: bool,
) -> ops.LossConfig:  # fmt: skip
    checks.check_choice(fn, "correction", correction, checks.CORRECTIONS)
    checks.check_choice(fn, "reduction", reduction, _REDUCTION)
    return ops.LossConfig(
        temperature=checks.as_positive(fn, "temperature", temperature),
        correction=checks.CORRECTIONS.index(correction),
        kd_weight=checks.as_float(fn, "kd_weight", kd_weight),
        alpha=checks.as_float(fn, "alpha", alpha),
        beta=None if beta is None else checks.as_float(fn, "beta", beta),
        ce_weight=checks.as_float(fn, "ce_weight", ce_weight),
        standardize=bool(standardize),
        tail=int(tail),
        reduction=_REDUCTION[reduction],
        ignore_index=checks.as_int(fn, "ignore_index", ignore_index),
        parts=bool(parts),
    )


# The options seldom change from call to call, and checking them takes as long as the kernel at 64 x 100. `typed`: 1 and
# True are equal, and only one of them is a number.
_remembered_options = functools.lru_cache(maxsize=256, typed=True)(_checked_options)
