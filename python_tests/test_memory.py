"""Memory beyond the inputs: one gradient buffer, and nothing of size N x C without a gradient."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sortkd_kernels import fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk, sort_logits

N, C = 64, 4096
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
OPTIONS = pytest.mark.parametrize(
    "options",
    (
        {},
        {"reduction": "none", "return_parts": True},
        {"standardize": True, "ce_weight": 0.1},
        {"temperature": 2.5, "ce_weight": 1.0},
    ),
    ids=str,
)


class Peak:
    """Bytes that PyTorch's CPU allocator held at the most, beyond what it held before."""

    def __init__(self, work) -> None:
        work()  # what is allocated once for ever is not counted
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
        held = self.bytes = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                self.bytes = max(self.bytes, held)
        del result


@pytest.fixture
def logits(dtype):
    student, teacher = (torch.randn(N, C).to(dtype) for _ in "st")
    return student, teacher, torch.randint(C, (N,))


def test_the_measure_sees_an_allocation():
    assert Peak(lambda: torch.zeros(N, C) + 1).bytes >= 2 * N * C * 4


@OPTIONS
@DTYPES
def test_one_gradient_buffer(logits, options):
    """Forward and backward: one buffer of the student's size, plus values of rows."""
    student, teacher, target = logits
    student.requires_grad_()

    def step():
        out = fused_sort_kd(student, teacher, target, **options)
        loss = out.loss if options.get("return_parts") else out
        return torch.autograd.grad(loss, student, torch.full_like(loss, 2.0))

    peak = Peak(step)
    assert student.nbytes <= peak.bytes < 1.1 * student.nbytes


@OPTIONS
@DTYPES
def test_none_without_a_gradient(logits, options):
    student, teacher, target = logits
    with torch.no_grad():
        for function in (fused_sort_kd, fused_sort_dkd):
            assert Peak(lambda f=function: f(student.requires_grad_(), teacher, target, **options)).bytes < 64 * N
    values, indices = teacher.topk(16)
    with torch.no_grad():
        assert Peak(lambda: fused_sort_kd_topk(student, values, indices, target)).bytes < 64 * N


@DTYPES
def test_none_in_place(dtype):
    """The gradient of logits that nobody reads again needs no memory of its own."""
    leaf = torch.randn(N, C).to(dtype).requires_grad_()
    teacher, target = torch.randn(N, C).to(dtype), torch.randint(C, (N,))

    def step(inplace):
        logits = leaf + 0
        return torch.autograd.grad(fused_sort_kd(logits, teacher, target, inplace=inplace), logits)

    assert Peak(lambda: step(True)).bytes < 1.1 * leaf.nbytes
    assert Peak(lambda: step(False)).bytes >= 2 * leaf.nbytes


@DTYPES
def test_sort_logits_writes_one_tensor(logits):
    _, teacher, target = logits
    peak = Peak(lambda: sort_logits(teacher, target))
    assert teacher.nbytes <= peak.bytes < 1.01 * teacher.nbytes + 4096


@DTYPES
def test_a_second_backward_costs_one_more(logits):
    """A kept graph keeps its buffer, and each call returns one that the caller may write to."""
    student, teacher, target = logits
    loss = fused_sort_kd(student.requires_grad_(), teacher, target)
    peak = Peak(lambda: torch.autograd.grad(loss, student, retain_graph=True))
    assert peak.bytes < 1.1 * student.nbytes
