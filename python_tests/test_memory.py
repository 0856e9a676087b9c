"""Memory beyond the inputs: one gradient buffer and values of rows; without a gradient nothing of size N x C."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BF16, F16, F32
from torch.profiler import ProfilerActivity, profile

from sortkd_kernels import fused_sort_dkd, fused_sort_kd, fused_sort_kd_topk, sort_logits

# The reference is a chain of PyTorch's ops and promises nothing.
EVERY_BACKEND = pytest.mark.parametrize("backend", [b for b in cases.BACKENDS if b != "reference"])
DTYPES = pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
OPTIONS = (
    {},
    {"reduction": "none", "return_parts": True},
    {"standardize": True, "ce_weight": 0.1},
    {"temperature": 2.5, "ce_weight": 1.0},
)


# Rows and classes. Many where nothing is computed (see `only_the_backends_own`), few where every thread is simulated.
SHAPES = {"native": (64, 4096), "triton": (4096, 32000), "simt": (24, 1000)}
# The GPU's kernels may keep entries of rows whose rank exceeds what a processor's shared memory holds: so much, whatever
# the number of rows and classes. The rows of "simt" are too short for that.
BUDGET = {"triton": 64 << 20}


def shape(backend):
    return SHAPES[backend]


def of_rows(backend):
    """Bytes that results and scratch may take: a hundred for each row, the alignment of a few buffers, and on the CPU what
    PyTorch converts a half gradient in, which is a few rows whatever N is."""
    N, C = shape(backend)
    return 100 * N + 2048 + (4 * C * 4 if backend == "native" else 0) + BUDGET.get(backend, 0)


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


@pytest.fixture(autouse=True)
def only_the_backends_own(request, monkeypatch, simt):
    """The harness's allocator, which guards what it hands out, reports nothing; Triton's interpreter copies tensors, so
    that its kernels are left out: they allocate nothing."""
    if simt is not None:
        simt.guard(False)
    if hasattr(request.node, "callspec") and "triton" in request.node.callspec.params.values():
        from triton.runtime.interpreter import InterpretedFunction

        monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: None)


def make(backend, dtype):
    N, C = shape(backend)
    # Without values where no kernel reads them: memory that nobody touches costs nothing.
    student, teacher = (
        torch.empty(N, C, dtype=dtype) if backend == "triton" else torch.randn(N, C).to(dtype) for _ in "st"
    )
    return student.requires_grad_(), teacher, torch.randint(C, (N,))


def test_the_measure_sees_an_allocation():
    assert Peak(lambda: torch.zeros(64, 4096) + 1).bytes >= 2 * 64 * 4096 * 4


@DTYPES
@EVERY_BACKEND
def test_one_gradient_buffer(backend, dtype):
    """Forward and backward. Where the gradient is kept for float16's backward pass, it is the only one as well."""
    student, teacher, target = make(backend, dtype)
    for options in OPTIONS:
        if backend == "triton" and dtype == BF16 and options.get("reduction") == "none":
            continue  # PyTorch multiplies by the rows' factors: value by value on a GPU, in a float copy on the CPU

        def step(options=options):
            out = fused_sort_kd(student, teacher, target, backend=backend, **options)
            loss = out.loss if options.get("return_parts") else out
            return torch.autograd.grad(loss, student, torch.full_like(loss, 2.0))

        assert student.nbytes <= Peak(step).bytes <= student.nbytes + of_rows(backend), options


@DTYPES
@EVERY_BACKEND
def test_none_without_a_gradient(backend, dtype):
    student, teacher, target = make(backend, dtype)
    values, indices = teacher.topk(16)
    calls = [lambda f=f, o=o: f(student, teacher, target, backend=backend, **o)
             for f in (fused_sort_kd, fused_sort_dkd) for o in OPTIONS]  # fmt: skip
    calls.append(lambda: fused_sort_kd_topk(student, values, indices, target, backend=backend))
    for call in calls:
        assert Peak(torch.no_grad()(call)).bytes <= of_rows(backend)


@DTYPES
@EVERY_BACKEND
def test_the_bucket(backend, dtype):
    """One gradient buffer as well, or none in place: what else is made has k values a row, of 64 bytes at the most."""
    student, teacher, target = make(backend, dtype)
    values, indices = teacher[:, :64].topk(4)
    room = of_rows(backend) + 64 * values.numel()

    def step(inplace):
        logits = student + 0
        loss = fused_sort_kd_topk(
            logits, values, indices, target, tail="bucket", ce_weight=0.1, inplace=inplace, backend=backend
        )
        return torch.autograd.grad(loss, logits)

    assert 2 * student.nbytes <= Peak(lambda: step(False)).bytes <= 2 * student.nbytes + room
    assert Peak(lambda: step(True)).bytes <= student.nbytes + room


@DTYPES
@EVERY_BACKEND
def test_none_in_place(backend, dtype):
    """The gradient of logits that nobody reads again needs no memory of its own."""
    leaf, teacher, target = make(backend, dtype)

    def step(inplace):
        logits = leaf + 0
        return torch.autograd.grad(fused_sort_kd(logits, teacher, target, inplace=inplace, backend=backend), logits)

    assert Peak(lambda: step(True)).bytes <= leaf.nbytes + of_rows(backend)
    assert Peak(lambda: step(False)).bytes >= 2 * leaf.nbytes


@DTYPES
@EVERY_BACKEND
def test_sort_logits_writes_one_tensor(backend, dtype):
    _, teacher, target = make(backend, dtype)
    peak = Peak(lambda: sort_logits(teacher, target, backend=backend))
    assert teacher.nbytes <= peak.bytes <= teacher.nbytes + of_rows(backend)


@DTYPES
@EVERY_BACKEND
def test_a_second_backward_costs_one_more(backend, dtype):
    """A kept graph keeps its buffer, and each call returns one that the caller may write to."""
    student, teacher, target = make(backend, dtype)
    loss = fused_sort_kd(student, teacher, target, backend=backend)
    peak = Peak(lambda: torch.autograd.grad(loss, student, retain_graph=True))
    assert peak.bytes <= student.nbytes + of_rows(backend)
