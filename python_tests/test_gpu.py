"""The op on a CUDA device, where there is one: what the CPU's tables have, on every backend that runs there.

    TRITON_INTERPRET=0 python -m pytest python_tests/test_gpu.py

tests the native kernels and Triton's compiled ones. Under `make test` Triton interprets (conftest.py), so a child tests
what it compiles. SORTKD_GPU_TESTS_ON=cpu rehearses everything that needs no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import test_bucket
import test_layouts
import test_pinned_rules
import test_topk
import torch
from cases import BF16, F16, F32, F64, IGNORE
from tolerance import assert_matches, expected

import sortkd_kernels
from sortkd_kernels import fused_sort_kd, reference, sort_logits

DEVICE = torch.device(os.environ.get("SORTKD_GPU_TESTS_ON", "cuda"))
ON_GPU = DEVICE.type == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    name
    for name, state in sortkd_kernels.available_backends().items()
    if state.available and DEVICE.type in state.devices and not (name == "triton" and INTERPRETED)
]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
on_gpu = pytest.mark.skipif(not ON_GPU, reason="a rehearsal on the CPU")
run_here = cases.run


def run(rows, variant, backend, wrap=lambda function: function) -> cases.Result:
    """`cases.run` on the device, its results on the host."""
    with DEVICE:
        result = run_here(cases.Rows(*(t.to(DEVICE) for t in rows)), variant, backend, wrap)
    return cases.Result(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in result))._replace(truncates=False)


@pytest.fixture(autouse=True)
def on_device(monkeypatch, poisoned_memory):
    """Whatever runs a case runs it on the device: the tests of the CPU's tables too, called from here."""
    monkeypatch.setattr(cases, "run", run)


def make(N, C, dtype=F32):
    """A leaf, a teacher and labels on the device."""
    rows = cases.make_rows(N, C, (dtype, dtype))
    student, teacher, target = (t.to(DEVICE) for t in rows)
    return student.requires_grad_(), teacher, target


LARGE = (cases.LARGE, cases.Shape(40, 20011, "rows of ranks beyond shared memory, several at once"))
GRID = [(s, v) for backend, s, v in cases.grid() if backend == "native"]
GRID += [(s, v) for s in LARGE for v in cases.TWO_VARIANTS]


@pytest.mark.parametrize(("shape", "variant"), GRID, ids=str)
@EVERY_BACKEND
def test_shapes(backend, shape, variant):
    want = expected(shape, variant.name)
    assert_matches(run(want.rows, variant, backend), want)


DTYPED = [case for backend, *case in cases.dtype_grid() if backend == "native"]
# Of halves the kernels have another way for ranks beyond shared memory.
BEYOND = (cases.Shape(6, 4099, "a rank of thousands, one past whole vectors"), LARGE[1])
DTYPED += [
    [d, s, v] for s in BEYOND for d in ((BF16, BF16), (F16, F16), (F32, BF16)) for v in cases.TWO_VARIANTS
]  # fmt: skip


@pytest.mark.parametrize(("dtypes", "shape", "variant"), DTYPED, ids=cases.case_id)
@EVERY_BACKEND
def test_dtypes(backend, dtypes, shape, variant):
    want = expected(shape, variant.name, dtypes)
    assert_matches(run(want.rows, variant, backend), want)


@pytest.mark.parametrize("form", test_layouts.FORMS)
@EVERY_BACKEND
def test_forms(backend, form):
    for variant in test_layouts.VARIANTS:
        for dtypes in ((F32, F32), (BF16, BF16)):
            test_layouts.check(backend, variant, dtypes, form, test_layouts.as_is, test_layouts.as_is)


@pytest.mark.parametrize("memory", test_layouts.MEMORIES, ids=lambda m: m.__name__)
@EVERY_BACKEND
def test_strides(backend, memory):
    for form in ("rows", "dense", "leading batch"):
        test_layouts.check(backend, test_layouts.VARIANTS[0], (F32, F32), form, memory, test_layouts.as_is)
        test_layouts.check(backend, test_layouts.VARIANTS[0], (F32, F32), form, test_layouts.as_is, memory)


@pytest.mark.parametrize("variant", test_topk.VARIANTS, ids=str)
@pytest.mark.parametrize("tail", ("renormalize", "uniform"))
@EVERY_BACKEND
def test_top_k(backend, tail, variant):
    for N, C, k in ((24, 12, 1), (24, 12, 7), (24, 12, 12), (24, 3001, 64), (6, 32000, 100)):
        test_topk.check(backend, variant, tail, N, C, k)


@pytest.mark.parametrize("variant", test_bucket.VARIANTS, ids=str)
@EVERY_BACKEND
def test_bucket_tail(backend, variant):
    for N, C, k in ((12, 12, 1), (12, 12, 7), (12, 12, 12), (12, 3001, 64), (6, 32000, 100)):
        test_bucket.check(backend, variant, N, C, k)


@pytest.mark.parametrize("variant", test_pinned_rules.VARIANTS, ids=str)
@EVERY_BACKEND
def test_pinned_rules_hold(backend, variant):
    """NaN in a row, and whatever a row to ignore holds, touches no other row."""
    for side in ("student", "teacher"):
        test_pinned_rules.test_nan_touches_its_own_row_only(backend, side, variant)
    test_pinned_rules.test_ignored_rows_may_hold_anything(backend, variant)


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@EVERY_BACKEND
def test_sort_logits(backend, dtype):
    for shape in (*cases.SHAPES, *LARGE):
        _, teacher, target = cases.make_rows(shape.N, shape.C, (dtype, dtype))
        for correction in ("sort", "swap", "none"):
            got = sort_logits(teacher.to(DEVICE), target.to(DEVICE), correction=correction, backend=backend)
            rows = reference.correct_logits(teacher, target.clamp_min(0), correction)
            assert torch.equal(got.cpu(), torch.where((target != IGNORE).unsqueeze(-1), rows, teacher)), shape


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=str)
@pytest.mark.parametrize("C", (9, 1000, 20011))
@EVERY_BACKEND
def test_in_place_and_retained_graph(backend, C, dtype):
    """The gradient lies where the logits were; two backward calls give it twice, whatever was done to the first."""
    leaf, teacher, target = make(12, C, dtype)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, ce_weight=0.2, backend=backend) * 3, leaf)
    logits = leaf + 0
    address = logits.data_ptr()
    loss = fused_sort_kd(logits, teacher, target, ce_weight=0.2, inplace=True, backend=backend) * 3
    (grad,) = torch.autograd.grad(loss, logits)
    assert backend == "reference" or grad.data_ptr() == address
    assert torch.equal(grad, want)
    loss = fused_sort_kd(leaf, teacher, target, ce_weight=0.2, backend=backend) * 3
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    first.fill_(7)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(second, want)


@EVERY_BACKEND
def test_kernels_of_one_shape(backend):
    """Triton's later calls launch what the first compiled: not for another dtype, nor for another alignment."""
    leaf, teacher, target = make(12, 1000)
    for dtype in (F32, F64, F16):
        for value in (2.0, 5.0):
            temperature = torch.tensor(value, dtype=dtype, device=DEVICE)
            want = fused_sort_kd(leaf, teacher, target, temperature=value, backend="reference")
            got = fused_sort_kd(leaf, teacher, target, temperature=temperature, backend=backend)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    want = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, backend="reference"), leaf)[0]
    for other in (teacher, teacher.double()):
        got = torch.autograd.grad(fused_sort_kd(leaf, other, target, backend=backend), leaf)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)
    for inplace in (False, True):
        logits = torch.empty(12 * 1000 + 1, device=DEVICE)[1:].view(12, 1000).copy_(leaf)  # no multiple of 16 bytes
        got = torch.autograd.grad(fused_sort_kd(logits, teacher, target, inplace=inplace, backend=backend), leaf)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


@EVERY_BACKEND
def test_gradient_scaler(backend):
    """Probabilities of 1e-8 are 0 in float16; the scale is multiplied in before the rounding."""
    student = torch.zeros(2, 40, dtype=F16)
    student[:, 3:] = -18.0
    teacher, target = torch.full((2, 40), -40.0, dtype=F16), torch.tensor([0, 1])
    teacher[:, :3] = 0
    leaf = student.to(DEVICE).requires_grad_()
    call = dict(temperature=1.0, reduction="sum", backend=backend)
    loss = fused_sort_kd(leaf, teacher.to(DEVICE), target.to(DEVICE), **call)
    torch.amp.GradScaler(DEVICE.type, init_scale=65536.0).scale(loss).backward()
    true = student.double().softmax(-1)[:, 3:]
    torch.testing.assert_close(leaf.grad.cpu().double()[:, 3:] / 65536, true, rtol=2**-11, atol=2.0**-25 / 65536)


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
@pytest.mark.parametrize("variant", cases.TWO_VARIANTS, ids=str)
@EVERY_BACKEND
def test_compiled(backend, variant, mode, fresh_compiler):
    """Three times: torch.compile's CUDA graphs are warmed up, recorded and replayed."""
    want = expected(cases.Shape(41, 9, "odd sizes"), variant.name)
    for _ in range(3):
        got = run(want.rows, variant, backend, lambda f: torch.compile(f, fullgraph=True, mode=mode))
        assert_matches(got, want)


@pytest.mark.parametrize("C", (100, 1000, 20011))
@EVERY_BACKEND
def test_bitwise_repeatable(backend, C):
    rows = cases.make_rows(70, C)
    for variant in cases.FEW_VARIANTS:
        one, other = (run(rows, variant, backend) for _ in range(2))
        assert all(a is b or torch.equal(a, b) for a, b in zip(one[:6], other[:6], strict=True)), variant


@on_gpu
@pytest.mark.parametrize("C", (100, 20011))
@EVERY_BACKEND
def test_another_stream_without_waiting(backend, C):
    """On the stream that is current, after the work that is on it, and never waiting for the device."""
    leaf, teacher, target = make(64, C)
    (want,) = torch.autograd.grad(fused_sort_kd(leaf, teacher, target, backend=backend), leaf)
    logits, side = torch.zeros_like(leaf, requires_grad=True), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # some 30 ms, in which a kernel on another stream would read zeros
            with torch.no_grad():
                logits.copy_(leaf)
            (got,) = torch.autograd.grad(fused_sort_kd(logits, teacher, target, backend=backend), logits)
            sort_logits(teacher, target, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@on_gpu
@pytest.mark.parametrize("shape", ((64, 100), (64, 20011), (5000, 100)), ids=str)
@EVERY_BACKEND
def test_cuda_graph(backend, shape):
    """A captured step reads nothing on the host: its replay computes the loss of the logits and labels that are there
    then, also where the labels are counted by a launch of their own."""
    student, teacher, target = make(*shape)

    def step():
        student.grad = None
        loss = fused_sort_kd(student, teacher, target, backend=backend)
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    grad = student.grad
    with torch.no_grad():
        student.mul_(0.5)
    target[::3] = IGNORE
    graph.replay()
    replayed = loss.clone(), grad.clone()
    assert torch.equal(replayed[0], step()) and torch.equal(replayed[1], student.grad)


@on_gpu
@pytest.mark.parametrize("shape", ((64, 100), (700, 40000), (5000, 30)), ids=str)
@EVERY_BACKEND
def test_launches_wait_for_what_is_before_them(backend, shape):
    """In a graph behind copies, one of them of another stream, and call after call on two streams: the native launches
    begin while the one before ends, and read nothing that it or a copy has yet to write."""
    leaf, teacher, target = make(*shape)
    want = fused_sort_kd(leaf, teacher, target, backend=backend)
    want.backward()
    student, late_teacher, late_target = torch.zeros_like(leaf).requires_grad_(), torch.zeros_like(teacher), target * 0
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or loaded at first is no part of the graph
        warm = torch.zeros_like(leaf).requires_grad_()
        fused_sort_kd(warm, late_teacher, late_target, backend=backend).backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        other.wait_stream(side)
        with torch.cuda.stream(other):
            late_teacher.copy_(teacher)
        with torch.no_grad():
            student.copy_(leaf)
        late_target.copy_(target)
        side.wait_stream(other)
        loss = fused_sort_kd(student, late_teacher, late_target, backend=backend)
        loss.backward()
    for _ in range(10):
        for x in (late_teacher, late_target, student.grad, loss.detach()):
            x.zero_()
        graph.replay()
        assert torch.equal(loss, want) and torch.equal(student.grad, leaf.grad)
    torch.cuda.synchronize()
    results = []
    for i in range(10):
        with torch.cuda.stream((side, other)[i % 2]):
            own = leaf.detach().clone().requires_grad_()
            results.append((fused_sort_kd(own, teacher, target, backend=backend), own))
            results[-1][0].backward()
    torch.cuda.synchronize()
    assert all(torch.equal(loss, want) and torch.equal(own.grad, leaf.grad) for loss, own in results)


# What rows whose rank exceeds shared memory may take, whatever N and C are.
BUDGET = 64 << 20


@on_gpu
@pytest.mark.parametrize(("shape", "budget"), (((65536, 1000), 0), ((4096, 128256), BUDGET)), ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_memory(backend, shape, budget):
    """One gradient buffer and one in a hundred; under `no_grad` the one in a hundred."""
    student, teacher = (torch.randn(shape, device=DEVICE, dtype=BF16) for _ in "st")
    target = torch.randint(shape[1], shape[:1], device=DEVICE)

    def peak(call):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        assert result is not None
        return torch.cuda.max_memory_allocated() - before

    leaf = student.requires_grad_()
    step = peak(lambda: torch.autograd.grad(fused_sort_kd(leaf, teacher, target, backend=backend), leaf))
    assert leaf.nbytes <= step <= 1.01 * leaf.nbytes + budget
    with torch.no_grad():
        assert peak(lambda: fused_sort_kd(leaf, teacher, target, backend=backend)) <= 0.01 * leaf.nbytes + budget


@on_gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_more_elements_than_32_bits_count(backend):
    """The last rows of 2.3e9 logits are what the same rows are alone."""
    N, C = 70_000, 32_768
    student, teacher = (torch.empty(N, C, device=DEVICE, dtype=BF16).normal_() for _ in "st")
    target = torch.randint(C, (N,), device=DEVICE)
    target[:-100] = teacher[:-100].argmax(-1)
    call = dict(reduction="none", return_parts=True, backend=backend)
    whole = fused_sort_kd(student.requires_grad_(), teacher, target, **call)
    (grad,) = torch.autograd.grad(whole.loss, student, torch.ones_like(whole.loss))
    leaf = student.detach()[-100:].clone().requires_grad_()
    alone = fused_sort_kd(leaf, teacher[-100:], target[-100:], **call)
    (want,) = torch.autograd.grad(alone.loss, leaf, torch.ones_like(alone.loss))
    assert torch.equal(whole.rank[-100:], alone.rank)
    torch.testing.assert_close(whole.loss[-100:], alone.loss, rtol=1e-6, atol=0)
    # Another number of rows may be given to other kernels, whose sums have another order: one rounding of bfloat16.
    torch.testing.assert_close(grad[-100:], want, rtol=2**-7, atol=1e-9)


BAD_LABEL = """
import sys, torch, sortkd_kernels as k
t = torch.randn(4, 10, device="cuda")
k.fused_sort_kd(t, t, torch.tensor([0, 1, int(sys.argv[2]), 3], device="cuda"), backend=sys.argv[1])
torch.cuda.synchronize()
"""


@on_gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_bad_label_stops_the_kernel(backend):
    """In a child: the device takes no further work after a failed assertion."""
    for label in ("10", "-1"):
        command = [sys.executable, "-c", BAD_LABEL, backend, label]
        root = str(Path(sortkd_kernels.__file__).parents[1])
        child = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
        assert child.returncode != 0 and "device-side assert" in child.stderr, child.stderr[-2000:]


@on_gpu
@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles in this process")
def test_compiled_triton():
    """This file again, in a process where Triton compiles."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", str(Path(__file__))]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
