"""What the tests of the Triton backend share: rows of a given rank, the backend's loss, and the truth about it."""

from __future__ import annotations

import itertools

import torch

from sortkd_kernels import reference
from sortkd_kernels.backends import triton as backend
from sortkd_kernels.ops import LossConfig

NONE, SUM, MEAN = range(3)
CORRECTIONS = ("none", "sort", "swap")
METHODS = tuple(itertools.product((False, True), repeat=3))  # decoupled, standardize, learned temperature
WEIGHTS = (0.9, 0.7, 3.0, 0.1)  # kd, alpha, beta, ce


def make(N, C, rank, dtype=torch.float32, seed=0):
    """Student, teacher and labels of a given rank; the teacher's logits are quarters, so that there are ties."""
    generator = torch.Generator().manual_seed(seed + 31 * N + C)
    student = (2 * torch.randn(N, C, generator=generator)).to(dtype)
    teacher = (torch.randn(N, C, generator=generator) * 12).round().div(4).to(dtype)
    order = teacher.argsort(dim=-1, descending=True, stable=True)
    anywhere = torch.randint(C, (N,), generator=generator)
    place = torch.as_tensor({"right": 0, "few": torch.arange(N) % 5, "last": C - 1, "random": anywhere}[rank])
    return student, teacher, order[torch.arange(N), place.clamp(max=C - 1)]


def expected(student, teacher, target, *, temperature=4.0, correction="sort", method=METHODS[0], reduction=MEAN,
             grad_output=None, dtype=torch.float64):  # fmt: skip
    """Loss, parts, rank and gradients by autograd through the reference."""
    student = student.to(dtype).detach().requires_grad_()
    temperature = torch.as_tensor(temperature, dtype=dtype).detach().requires_grad_()
    kd, ce, rank = reference.loss_rows(
        student, teacher.to(dtype), target, temperature=temperature, correction=correction,
        standardized=method[1], alpha=WEIGHTS[1], beta=WEIGHTS[2] if method[0] else None,
    )  # fmt: skip
    count = (target != -100).sum() if reduction == MEAN else 1
    parts = [x.reshape(target.shape) if reduction == NONE else x.sum() / count for x in (kd, ce)]
    loss = WEIGHTS[0] * parts[0] + WEIGHTS[3] * parts[1]
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(dtype))
    return loss.detach(), parts[0].detach(), parts[1].detach(), rank, student.grad, temperature.grad


def run(student, teacher, target, *, temperature=4.0, correction="sort", method=METHODS[0], reduction=MEAN,
        grad_output=None, indices=None, uniform=False, with_grad=True, inplace=False):  # fmt: skip
    """The backend's loss."""
    learned = isinstance(temperature, torch.Tensor)
    kd_weight, alpha, beta, ce_weight = WEIGHTS
    config = LossConfig(
        1.0 if learned else temperature, CORRECTIONS.index(correction), kd_weight, alpha, beta if method[0] else None,
        ce_weight, method[1], uniform, reduction, -100, True,
    )  # fmt: skip
    return backend.loss_forward(
        student, teacher, indices, target, temperature if learned else None, config, grad_output, with_grad,
        learned and with_grad, inplace,
    )  # fmt: skip


def check(got, truth, plain):
    """float32 results against the truth in float64; ``plain``: the same formula in float32 PyTorch."""
    assert torch.equal(got[3], truth[3])
    names = ("loss", "kd", "ce", "rank", "grad_student", "grad_temperature")
    for name, g, t, p in zip(names, got, truth, plain, strict=True):
        if name != "rank" and g.numel():
            assert g.shape == t.shape, name
            near(g, t, p, name)


def near(got, truth, plain, name=""):
    """Judged by what ``plain`` errs: twice that plus 8 units in the last place of the largest value.

    Both are rounding noise, of other sums.
    """
    error, slack = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    largest = truth.abs().max()
    assert error <= 2 * slack + 8 * 2**-24 * largest, (name, float(error), float(slack), float(largest))
