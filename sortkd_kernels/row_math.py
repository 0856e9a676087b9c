"""`csrc/row_math.h` for tensors of rows: from the rows' sums to their losses and to what the gradient pass needs.

Everything is float64, one value a row. The derivations are in :mod:`sortkd_kernels.reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import STANDARDIZE_EPS


class RowSums(NamedTuple):
    """Over the classes without the label; ``v``: logits relative to a reference, in nats, over the temperature."""

    z_student: Tensor
    z_teacher: Tensor
    cross: Tensor
    z_ce: Tensor
    moment_student: Tensor
    moment_teacher: Tensor
    moment_cross: Tensor
    v_label_student: Tensor
    v_label_teacher: Tensor
    v_label_ce: Tensor


class RowTerms(NamedTuple):
    """Loss terms, and what multiplies the exponentials in their gradient."""

    kd: Tensor
    ce: Tensor
    on_student: Tensor
    on_teacher: Tensor
    at_label: Tensor
    on_ce: Tensor
    ce_at_label: Tensor
    u_dot_grad: Tensor
    grad_temperature: Tensor


def row_terms(sums: RowSums, temperature: Tensor, config: Any, classes: int, moments: bool) -> RowTerms:
    """``moments``: the sums of that name are there, and the derivatives that need them are wanted."""
    zero = torch.zeros_like(temperature)
    decoupled = config.beta is not None
    log_z_s, log_z_t = sums.z_student.log(), sums.z_teacher.log()
    odds_s, odds_t = sums.v_label_student - log_z_s, sums.v_label_teacher - log_z_t
    q, q_others, p, p_others = odds_s.sigmoid(), (-odds_s).sigmoid(), odds_t.sigmoid(), (-odds_t).sigmoid()
    teacher_alone, student_alone = sums.z_teacher == 0, sums.z_student == 0
    alone = teacher_alone | student_alone

    # In log space: 1 - q_y keeps its digits where q_y rounds to 1.
    tckd = _expected(p, F.logsigmoid(odds_t) - F.logsigmoid(odds_s))
    tckd = tckd + _expected(p_others, F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
    # A teacher that leaves nothing beside the label leaves nothing to match there; a student that has nothing there can
    # match no teacher that has.
    nckd = torch.where(student_alone, torch.inf, sums.cross / sums.z_teacher - log_z_t + log_z_s)
    nckd = nckd.masked_fill(teacher_alone, 0)
    a = zero + (config.alpha if decoupled else 1)
    b = (zero + config.beta_of(classes) if decoupled else p_others).masked_fill(teacher_alone, 0)
    f = _weighted(a, tckd) + _weighted(b, nckd)

    pull = a * (q - p)
    on_student = _mean_of(b - pull if decoupled else q_others, sums.z_student)
    ce = on_ce = ce_at_label = zero
    if config.with_ce:
        odds_ce = sums.v_label_ce - sums.z_ce.log()
        ce, ce_at_label = -F.logsigmoid(odds_ce), -(-odds_ce).sigmoid()
        on_ce = _mean_of(-ce_at_label, sums.z_ce)
    u_dot_grad = grad_temperature = zero
    if moments:
        mean_s = _mean_of(sums.moment_student, sums.z_student)
        mean_t, cross, of_cross = (
            (x / sums.z_teacher).masked_fill(alone, 0) for x in (sums.moment_teacher, sums.cross, sums.moment_cross)
        )
        covariance = of_cross - mean_t * cross
        u_dot_grad = b * (mean_s - mean_t + cross) + _expected(pull, sums.v_label_student - mean_s)
        dodds_t = _expected(p * p_others, sums.v_label_teacher - mean_t)
        along = b * covariance + _expected(dodds_t, a * (odds_t - odds_s))
        if not decoupled:  # beta = 1 - p_y depends on the teacher too
            along = along - _expected(dodds_t, nckd)
        grad_temperature = 2 * temperature * f - temperature * (u_dot_grad + along)
    return RowTerms(
        temperature.square() * f, ce, on_student, _mean_of(b, sums.z_teacher), pull, on_ce, ce_at_label, u_dot_grad,
        grad_temperature,
    )  # fmt: skip


def _expected(p: Tensor, x: Tensor) -> Tensor:
    """What has no probability takes no part, whatever it is."""
    return (p * x).masked_fill(p == 0, 0)


def _weighted(weight: Tensor, term: Tensor) -> Tensor:
    """An infinite term of weight 0 takes no part. A NaN does."""
    return (weight * term).masked_fill((weight == 0) & term.isinf(), 0)


def _mean_of(total: Tensor, z: Tensor) -> Tensor:
    """The mean over no class is 0."""
    return (total / z).masked_fill(z == 0, 0)


class Coefficients(NamedTuple):
    """Of the gradient by the student's logits, all weights and factors multiplied in."""

    on_student: Tensor
    on_teacher: Tensor
    on_ce: Tensor
    at_label: Tensor
    dstd: Tensor


def gradient_coefficients(
    terms: RowTerms, config: Any, scale: Tensor, temperature: Tensor, inverse: Tensor, classes: int,
    label_logit: Tensor, mean: Tensor, std: Tensor,
) -> Coefficients:  # fmt: skip
    """``scale`` multiplies a row's loss, ``inverse`` its logits; the last three are the student's."""
    on_kd = scale * config.kd_weight * temperature.square() * inverse
    at_label = on_kd * terms.at_label
    on_ce = torch.zeros_like(on_kd)
    if config.ce_weight:
        on_ce = scale * config.ce_weight * terms.on_ce
        at_label = at_label + scale * config.ce_weight * terms.ce_at_label
    dstd = torch.zeros_like(on_kd)
    if config.standardize:
        through = on_kd * terms.u_dot_grad / (inverse * (classes - 1) * std * (std + STANDARDIZE_EPS))
        dstd = through.masked_fill(std == 0, 0)
        at_label = at_label - dstd * (label_logit - mean)
    return Coefficients(on_kd * terms.on_student, on_kd * terms.on_teacher, on_ce, at_label, dstd)
