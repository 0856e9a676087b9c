r"""The mathematics of this package, in the plainest form: the oracle that every kernel is tested against.

Source: "Parameter-Free Logit Distillation via Sorting Mechanism", IEEE SPL 2025, arXiv 2508.16544 (Sort-KD). DKD is
arXiv 2203.08679, LSKD arXiv 2403.01427, CTKD arXiv 2211.16231. Everything here is ordinary differentiable PyTorch in
whatever float dtype it is given; nothing is shared with the kernels but :func:`bucket_teacher`.

The correction (:func:`sort_logits`)
------------------------------------
One row: teacher logits ``t`` of ``C`` classes, label ``y``. Order the classes by logit, descending, with the label
moved to the front; order the values, descending; hand the k-th value to the k-th class.

*Why the kernels need no sort.* Let ``A = {i : t_i > t_y}`` and ``r = |A|``, the rank of the label. In the order of the
values, A fills the places ``0 .. r-1`` and the label place ``r`` (a class that ties with the label is not in A, and is
not moved in front of it either: both the label and its ties hold the same value). Moving the label to the front shifts
each class of A one place down and leaves all others where they were. So ``t'`` is ``t`` with its top ``r + 1`` values
rotated by one: the label takes the maximum, each class of A takes the next lower value of ``A + {y}``, and every other
class keeps its own. With ``r = 0`` nothing moves. ``t'`` is a permutation of ``t``, so its maximum, logsumexp and
entropy are those of ``t``; and since ranks survive an increasing map, the correction commutes with temperature
and z-score.

The losses of a row
-------------------
Student logits ``s``, temperature ``T``, and ``t'`` from above:

.. math::

    u = s / T \qquad v = t' / T \qquad q = \text{softmax}(u) \qquad p = \text{softmax}(v)

With standardization (LSKD) ``s`` and ``t'`` are first replaced by ``(x - mean) / (1e-7 + std)`` over the classes,
``std`` with ``C - 1`` (and 0 for ``C = 1``). A class with ``p_i = 0`` counts 0. The cross-entropy is that of the
student's own logits.

.. math::

    \text{KD} &= T^2 \sum_i p_i (\log p_i - \log q_i) \\
    \text{DKD} &= \alpha \, \text{TCKD} + \beta \, \text{NCKD} \\
    \text{TCKD} &= T^2 \text{KL}((p_y, 1 - p_y) \,\|\, (q_y, 1 - q_y)) \\
    \text{NCKD} &= T^2 \text{KL}(\hat p \,\|\, \hat q)
        \qquad \hat p_i = p_i / (1 - p_y) \qquad \hat q_i = q_i / (1 - q_y) \qquad i \ne y \\
    \text{KD} &= \text{TCKD} + (1 - p_y) \text{NCKD} \\
    \text{CE} &= -\log \text{softmax}(s)_y

*The gradient.* The derivative of ``log q_j`` by ``u_i`` is ``[i = j] - q_i``, and the ``p_j`` sum to 1, so that of KL
by ``u`` is ``q - p``; ``u`` by ``s`` gives ``1 / T``:

.. math::

    \partial \text{KD} / \partial s &= T (q - p) \\
    \partial \text{DKD} / \partial s_y &= \alpha T (q_y - p_y) \\
    \partial \text{DKD} / \partial s_i &= T ((\beta - \alpha (q_y - p_y)) \hat q_i - \beta \hat p_i) \qquad i \ne y

Pinned rules: where the teacher leaves nothing beside the label (all other logits at -inf) there is nothing to match
there, and NCKD and its gradient are 0; where only the student has nothing there, the loss is infinite. A term of weight
0 takes no part, infinite or not. Ties among teacher logits rank the lower class index first; NaN anywhere in a row
makes that row NaN and no other; a row whose target is ``ignore_index`` has loss 0, gradient 0 and does not count in
the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

STANDARDIZE_EPS = 1e-7


def sort_logits(teacher: Tensor, target: Tensor) -> Tensor:
    """The paper's operation on ``teacher`` ``[N, C]`` for ``target`` ``[N]``: two full stable sorts."""
    label = target.unsqueeze(-1)
    label_first = teacher.scatter(-1, label, torch.inf).argsort(dim=-1, descending=True, stable=True)
    values = teacher.sort(dim=-1, descending=True, stable=True).values
    return _nan_rows(torch.empty_like(values).scatter(-1, label_first, values), teacher)


def swap_logits(teacher: Tensor, target: Tensor) -> Tensor:
    """Exchange the largest logit with the label's (SLD, RLD); the first of several largest is the one exchanged."""
    label = target.unsqueeze(-1)
    top = teacher.argmax(dim=-1, keepdim=True)
    swapped = teacher.scatter(-1, top, teacher.gather(-1, label)).scatter(-1, label, teacher.gather(-1, top))
    return _nan_rows(torch.where(teacher.gather(-1, top) > teacher.gather(-1, label), swapped, teacher), teacher)


def correct_logits(teacher: Tensor, target: Tensor, correction: str) -> Tensor:
    """``teacher`` ``[N, C]`` under one of the corrections ``"sort"``, ``"swap"``, ``"none"``."""
    if correction == "none":
        return _nan_rows(teacher, teacher)
    return sort_logits(teacher, target) if correction == "sort" else swap_logits(teacher, target)


def rank_of_label(teacher: Tensor, target: Tensor) -> Tensor:
    """The number of classes above the label, ``[N]`` int32."""
    return (teacher > teacher.gather(-1, target.unsqueeze(-1))).sum(-1, dtype=torch.int32)


def standardize(logits: Tensor) -> Tensor:
    """LSKD's z-score over the classes, ``[N, C]``."""
    centred = logits - logits.mean(-1, keepdim=True)
    if logits.shape[-1] == 1:
        return centred / STANDARDIZE_EPS
    return centred / (STANDARDIZE_EPS + logits.std(-1, keepdim=True))


def kd_rows(student: Tensor, corrected: Tensor, temperature: Tensor) -> Tensor:
    """``T^2 KL(softmax(corrected / T) || softmax(student / T))`` of each row, ``[N]``."""
    return temperature**2 * _kl(_log_softmax(corrected, temperature), _log_softmax(student, temperature))


def dkd_rows(
    student: Tensor, corrected: Tensor, target: Tensor, temperature: Tensor, alpha: float, beta: float
) -> Tensor:
    """``alpha TCKD + beta NCKD`` of each row, ``[N]`` (DKD, equation 7), in log space throughout."""
    log_p, others_p, without_p = _around_label(corrected, target, temperature)
    log_q, others_q, without_q = _around_label(student, target, temperature)
    tckd = _kl(torch.stack([log_p, others_p], -1), torch.stack([log_q, others_q], -1))
    return temperature**2 * (_weighted(alpha, tckd) + _weighted(beta, _kl(without_p, without_q)))


def _around_label(logits: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``log p_y`` and ``log(1 - p_y)``, ``[N]``, and the log-softmax of the others, ``[N, C]``, -inf at the label.

    Where all other classes are at -inf, they have no distribution: their entries are -inf too.
    """
    scaled = _scaled(logits, temperature)
    others = scaled.masked_fill(F.one_hot(target, logits.shape[-1]).bool(), -torch.inf)
    none = (others == -torch.inf).all(-1, keepdim=True)
    total = torch.logsumexp(others.masked_fill(none, 0.0), -1, keepdim=True)
    of_label = scaled.gather(-1, target.unsqueeze(-1))
    pair = F.log_softmax(torch.cat([of_label, total.masked_fill(none, -torch.inf)], -1), -1)
    return pair[..., 0], pair[..., 1], others - total


def loss_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float = 4.0,
    correction: str = "sort",
    alpha: float = 1.0,
    beta: float | None = None,
    standardized: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The distillation term, the cross-entropy and the rank of each row.

    Args:
        student, teacher: logits ``[N, C]`` of one float dtype.
        target: labels ``[N]``, int64.
        temperature: a float, a 0-d tensor, or one value a row ``[N]``.
        alpha, beta: the weights of DKD's terms; KD where ``beta`` is None.
        standardized: LSKD's z-score of both sides.
    Returns:
        ``kd``, ``ce`` (floats ``[N]``, differentiable in student and temperature) and ``rank`` (int32 ``[N]``).
    """
    counts = target != ignore_index
    # An ignored row may hold anything, NaN included: zero it before any arithmetic, or 0 * NaN reaches the gradient.
    student = torch.where(counts.unsqueeze(-1), student, 0.0)
    teacher = torch.where(counts.unsqueeze(-1), teacher, 0.0)
    label = torch.where(counts, target, 0)
    # A number that the host would copy to the device would make it wait.
    t = temperature.to(student) if isinstance(temperature, Tensor) else student.new_full((), temperature)
    t = t.expand(target.shape)

    corrected = correct_logits(teacher, label, correction)
    rank = rank_of_label(teacher, label)
    s = standardize(student) if standardized else student
    corrected = standardize(corrected) if standardized else corrected
    kd = kd_rows(s, corrected, t) if beta is None else dkd_rows(s, corrected, label, t, alpha, beta)
    ce = F.cross_entropy(student, label, reduction="none")
    zero = torch.zeros_like(ce)
    return torch.where(counts, kd, zero), torch.where(counts, ce, zero), rank


def densify_top_k(
    values: Tensor, indices: Tensor, classes: int, uniform_tail: bool, target: Tensor | None = None
) -> Tensor:
    """The full rows ``[N, C]`` that top-k ``values`` and ``indices`` ``[N, k]`` stand for.

    Absent classes hold ``-inf``; or, with ``uniform_tail``, an equal share each of the mass that the values, then
    log-probabilities, leave to 1 (nothing where rounding has left none). Where ``target`` ``[N]`` is among the k more
    than once, its first entry counts.
    """
    rows, k = values.shape
    present = torch.full_like(indices[:, :1], k)
    counted = values
    if target is not None:
        is_label, place = _label_entries(indices, target)
        values = torch.where(is_label, values.gather(-1, place.clamp_max(k - 1)), values)
        later = is_label & (torch.arange(k, device=place.device) != place)
        present, counted = k - later.sum(-1, keepdim=True), values.masked_fill(later, -torch.inf)
    tail = torch.full_like(values[:, :1], -torch.inf)
    if uniform_tail:
        left = 1 - counted.exp().sum(-1, keepdim=True)
        left = torch.where(left > 0, left, torch.where(left.isnan(), torch.nan, 0.0))
        tail = torch.where(present < classes, left.div((classes - present).clamp_min(1)).log(), tail)
    return tail.expand(rows, classes).scatter(-1, indices, values)


def bucket_teacher(
    values: Tensor,
    indices: Tensor,
    target: Tensor,
    classes: int,
    correction: str,
    correct: Callable[[Tensor, Tensor, str], Tensor] = correct_logits,
    with_rank: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """A top-k teacher with its absent classes in one, the bucket, after the correction.

    The rule is the uniform tail's, with the absent classes then merged: the full row of :func:`densify_top_k` is
    corrected, and of the absent classes those that still hold a share make the bucket. Only the k and a label outside
    them are ever moved, so no full row is made. A label among the k leaves the bucket as it is, which is above no
    label. A label outside holds a share, ``left / absent``. Corrected, it leaves the bucket, which keeps the shares of
    the others; uncorrected it stays inside.

    Args:
        values: log-probabilities at temperature 1, ``[N, k]``, in the dtype of the result.
        indices: their classes, distinct but for the label's, whose first entry counts.
        target: ``[N]``; a row whose target is no class comes out as one with a label outside.
        correct: :func:`correct_logits`, or what does the same.

    Returns:
        Log-probabilities ``[N, k + 2]`` of the k, the label and the bucket, ``-inf`` for what is left out: the label
        where it is among the k or in the bucket, its later entries, and the bucket where nothing is left. And the rank
        of the label, int32 ``[N]``, or None.
    """
    k = values.shape[-1]
    is_label, place = _label_entries(indices, target)
    later = is_label & (torch.arange(k, device=place.device) != place)
    values = values.masked_fill(later, -torch.inf)
    # In double, where there is one: what is left has the error of a number near 1.
    mass = (values if values.device.type == "mps" else values.double()).exp().sum(-1, keepdim=True)
    absent, outside = (classes - k + later.sum(-1, keepdim=True)).to(mass.dtype), place == k
    left = (-mass.clamp_max(1.0)).log1p().masked_fill(absent == 0, -torch.inf)
    share = torch.where(outside, left - absent.log(), -torch.inf).to(values.dtype)
    row = torch.cat([values, share], -1)
    rank = (row > row.gather(-1, place)).sum(-1, dtype=torch.int32) if with_rank else None
    if correction == "none":
        row = torch.cat([values, torch.full_like(share, -torch.inf)], -1)
    else:
        row = correct(row, place.squeeze(-1), correction)
        left = torch.where(outside, left + (-1.0 / absent).log1p(), left)
    return torch.cat([row, left.to(row.dtype)], -1), rank


def bucket_student(student: Tensor, indices: Tensor, target: Tensor, correction: str) -> tuple[Tensor, Tensor]:
    """The student's logits ``[N, k + 2]`` of the same classes, and the label's place among them ``[N]``.

    That of the bucket is the logsumexp of its classes, so that the k + 2 have the probabilities of the row.
    """
    k = indices.shape[-1]
    label = target.unsqueeze(-1)
    is_label, place = _label_entries(indices, target)
    taken = torch.zeros_like(student, dtype=torch.bool).scatter(-1, indices, True)
    apart = place == k
    if correction == "none":
        place = place + apart
        apart = torch.zeros_like(apart)
    taken = taken.scatter(-1, label, taken.gather(-1, label) | apart)
    rest = student.masked_fill(taken, -torch.inf)
    empty = (rest == -torch.inf).all(-1, keepdim=True)
    bucket = rest.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    of_k = student.gather(-1, indices)
    of_k = of_k.masked_fill(is_label & (torch.arange(k, device=place.device) != place), -torch.inf)
    of_label = student.gather(-1, label).masked_fill(~apart, -torch.inf)
    return torch.cat([of_k, of_label, bucket], -1), place.squeeze(-1)


def bucket_rows(
    student: Tensor, teacher: Tensor, indices: Tensor, target: Tensor, *, temperature: Tensor | float, correction: str,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KD of the k + 2 classes, ``teacher`` being :func:`bucket_teacher`'s, and the cross-entropy of all: ``[N]``."""
    counts = target != ignore_index
    student = torch.where(counts.unsqueeze(-1), student, 0.0)
    label = torch.where(counts, target, 0)
    small, place = bucket_student(student, indices, label, correction)
    place = torch.where(counts, place, -1)
    kd, _, _ = loss_rows(small, teacher, place, temperature=temperature, correction="none", ignore_index=-1)
    ce = F.cross_entropy(student, label, reduction="none")
    return kd, torch.where(counts, ce, 0.0)


def _label_entries(indices: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the k are the label, ``[N, k]``, and the first of them, ``[N, 1]``, k where there is none."""
    is_label = indices == target.to(indices.dtype).unsqueeze(-1)
    first = is_label.to(torch.uint8).argmax(-1, keepdim=True)
    return is_label, torch.where(is_label.gather(-1, first), first, indices.shape[-1])


def _log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    return F.log_softmax(_scaled(logits, temperature), -1)


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    # -inf stays -inf at any temperature; differentiated by it, the quotient would give 0 * inf.
    t, never = temperature.unsqueeze(-1), logits == -torch.inf
    return torch.where(never, logits / t.detach(), torch.where(never, 0.0, logits) / t)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)


def _weighted(weight: float, term: Tensor) -> Tensor:
    return weight * (term if weight else term.masked_fill(term.isinf(), 0.0))


def _nan_rows(result: Tensor, teacher: Tensor) -> Tensor:
    return torch.where(teacher.isnan().any(-1, keepdim=True), torch.nan, result)
