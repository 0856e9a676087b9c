"""How far a result may be off, element by element, and why.

The yardstick of each number is the size of what it is the difference of, in float64: a gradient is the difference of
two probabilities, a loss that of two entropies. An algorithm that holds these in floats of unit roundoff u is off by a
few u of them, however small the difference is. Relative to the difference itself the error has no bound: with two
classes z-scores are +-0.707 whatever the logits, and the true gradient is 0.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from cases import (
    BY_NAME,
    F16,
    F32,
    F64,
    IGNORE,
    Result,
    Rows,
    Shape,
    Variant,
    arithmetic,
    grad_output_of,
    make_rows,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

from sortkd_kernels import reference

# Unit roundoffs of the yardstick that a result may be off. Plain float32 PyTorch on the same formula needs a sixth to
# all of them (`test_tolerance_is_tight`); the kernels' exponential has a relative error of 3.5 of them by design.
ROUNDINGS = {"loss": 8, "kd": 8, "ce": 6, "grad": 24, "grad_temperature": 8}
# In float64 the reference is no truth but an equal: it sums one after the other where the kernels sum in blocks.
EQUALS = 4


class Yardstick(NamedTuple):
    loss: Tensor
    kd: Tensor
    ce: Tensor
    grad: Tensor
    grad_temperature: Tensor


def yardstick(rows: Rows, variant: Variant) -> Yardstick:
    """The sizes of what is subtracted, in the shapes of the results of `cases.run`."""
    options = variant.options
    counts = rows.target != IGNORE
    label = torch.where(counts, rows.target, 0)
    classes = rows.student.shape[1]
    at_label = F.one_hot(label, classes).bool()
    temperature = torch.as_tensor(variant.make_temperature(len(label), F64)).detach().expand(label.shape)
    student = rows.student.double()
    teacher = reference.correct_logits(rows.teacher.double(), label, options.get("correction", "sort"))
    s, t, deviation = student, teacher, torch.ones(len(label), dtype=F64)
    if options.get("standardize"):
        s, t = reference.standardize(student), reference.standardize(teacher)
        deviation = reference.STANDARDIZE_EPS + (student.std(-1) if classes > 1 else torch.zeros_like(deviation))
    u, v = s / temperature.unsqueeze(-1), t / temperature.unsqueeze(-1)
    depth_u, depth_v = _depth(u), _depth(v)

    target_weight, others_weight = (
        (options.get("alpha", 1.0), options.get("beta", 8.0)) if variant.decoupled else (1, 0)
    )
    entropies = target_weight * _entropies(v, u)
    probabilities = (target_weight + others_weight) * (_softmax(u) + _softmax(v))
    if variant.decoupled and classes > 1:
        others_u, others_v = u.masked_fill(at_label, -torch.inf), v.masked_fill(at_label, -torch.inf)
        entropies = entropies + others_weight * _entropies(others_v, others_u)
        probabilities = probabilities + others_weight * (_softmax(others_u) + _softmax(others_v))
    kd = temperature**2 * entropies.sum(-1)
    along_temperature = (entropies * depth_v + probabilities * (depth_u + depth_v)).sum(-1) * temperature
    grad_temperature = along_temperature + 2 * kd / temperature
    if options.get("standardize") and classes > 1:  # what goes through the student's deviation is a sum over the row
        probabilities = probabilities + (probabilities * s.abs()).sum(-1, keepdim=True) * s.abs() / (classes - 1)
    grad = probabilities * (temperature / deviation).unsqueeze(-1)

    # The cross-entropy is the logarithm of a sum of about 1, and its gradient at the label is q - 1.
    ce = F.cross_entropy(student, label, reduction="none") + 1
    grad_ce = _softmax(student) + at_label

    kd_weight, ce_weight = options.get("kd_weight", 1.0), options.get("ce_weight", 0.0)
    reduction = options.get("reduction", "mean")
    count = counts.sum() if "mean" in reduction else 1
    grad_output = (grad_output_of(kd) if reduction == "none" else torch.ones_like(kd)) * counts / count
    grad = (kd_weight * grad + ce_weight * grad_ce) * grad_output.unsqueeze(-1)
    grad_temperature = kd_weight * grad_temperature * grad_output
    kd, ce = (x * counts if reduction == "none" else (x * counts).sum() / count for x in (kd, ce))
    if "scalar" in str(variant.temperature):
        grad_temperature = grad_temperature.sum()
    return Yardstick(kd_weight * kd + ce_weight * ce, kd, ce, grad, grad_temperature)


class Expected(NamedTuple):
    rows: Rows
    variant: Variant
    truth: Result
    yardstick: Yardstick


def expect(rows: Rows, variant: Variant) -> Expected:
    return Expected(rows, variant, truth(rows, variant), yardstick(rows, variant))


@functools.lru_cache(maxsize=4)  # the backends of one case follow each other
def expected(shape: Shape, variant: str, dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)) -> Expected:
    """Input of a case of the tables, and what comes out in float64."""
    return expect(make_rows(shape.N, shape.C, dtypes), BY_NAME[variant])


def errors_in_roundings(got: Result, want: Expected) -> dict[str, Tensor]:
    """The error of each number in unit roundoffs of its yardstick, beyond the one rounding to the student's dtype.

    The gradient is rounded in the forward pass and once more by a gradient of the loss that differs from 1; float16 has
    no range for that and is made in the backward pass, rounded once.
    """
    work = arithmetic(want.rows.student.dtype, want.rows.teacher.dtype)
    errors = {}
    for name in ROUNDINGS:
        value, true, size = getattr(got, name), getattr(want.truth, name), getattr(want.yardstick, name)
        assert (value is None) == (true is None), f"{name}: {value} where the truth is {true}"
        if value is None:
            continue
        assert value.shape == true.shape, f"{name} has shape {tuple(value.shape)}, not {tuple(true.shape)}"
        error = (value.double() - true).abs()
        if value.dtype != work:
            dtype = torch.finfo(value.dtype)
            times = 2 if value.dtype != F16 and want.variant.options.get("reduction") == "none" else 1
            if got.truncates:
                error = error - 4 * dtype.smallest_normal  # the gradient of the loss multiplies the false zero too
                times *= 2
            error = (error - times * dtype.eps / 2 * (true.abs() + dtype.smallest_normal)).clamp_min(0)
        # NaN against NaN (a mean over nothing) agrees; NaN against a number does not.
        agrees = (error == 0) | (value.isnan() & true.isnan())
        errors[name] = torch.where(agrees, 0.0, (error / size).nan_to_num(torch.inf)) / (torch.finfo(work).eps / 2)
    return errors


def assert_matches(got: Result, want: Expected) -> None:
    """Every number within its roundings of the truth, of the promised dtype; ranks exactly."""
    student, teacher, _ = want.rows
    work = arithmetic(student.dtype, teacher.dtype)
    assert (got.loss.dtype, got.kd.dtype, got.ce.dtype, got.grad.dtype) == (work, work, work, student.dtype)
    assert got.rank.dtype == torch.int32
    assert torch.equal(got.rank, want.truth.rank)
    for name, error in errors_in_roundings(got, want).items():
        allowed = ROUNDINGS[name] * (EQUALS if work == F64 else 1)
        worst = error.max().item() if error.numel() else 0.0
        assert worst <= allowed, (
            f"{name} is off by {worst:.1f} roundings where {allowed} are allowed, at "
            f"{tuple(i.item() for i in torch.unravel_index(error.argmax(), error.shape))}"
        )


def _softmax(x: Tensor) -> Tensor:
    """Probabilities, times the error of their exponent: one of depth d below the maximum carries d roundings."""
    p = x.softmax(-1)
    return torch.where(p == 0, 0.0, p * (1 + _depth(x)))


def _depth(x: Tensor) -> Tensor:
    depth = x.amax(-1, keepdim=True) - x if x.numel() else x
    return torch.where(depth == torch.inf, 0.0, depth)


def _entropies(v: Tensor, u: Tensor) -> Tensor:
    log_p, log_q = v.log_softmax(-1), u.log_softmax(-1)
    p = log_p.exp()
    return p * torch.where(p == 0, 0.0, log_p.abs() + log_q.abs())
