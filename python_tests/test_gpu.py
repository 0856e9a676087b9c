"""The op's grid on a CUDA device, where there is one: every backend that runs there, against the reference in float64.

In this process Triton interprets (conftest.py), so its compiled kernels run in a child, by this same file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from tolerance import assert_matches, expected

import sortkd_kernels

DEVICE = torch.device("cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    name
    for name, state in sortkd_kernels.available_backends().items()
    # The child need not repeat what the parent runs.
    if state.available and DEVICE.type in state.devices and (name == "native") == INTERPRETED
]

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(rows: cases.Rows, variant: cases.Variant, backend: str) -> cases.Result:
    """`cases.run` on the device."""
    with DEVICE:
        result = cases.run(cases.Rows(*(t.to(DEVICE) for t in rows)), variant, backend)
    return cases.Result(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in result))._replace(truncates=False)


@pytest.mark.parametrize("shape", (*cases.SHAPES, cases.LARGE), ids=str)
@pytest.mark.parametrize("variant", cases.VARIANTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, variant, shape):
    want = expected(shape, variant.name)
    assert_matches(run(want.rows, variant, backend), want)


@pytest.mark.parametrize("dtypes", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("variant", cases.FEW_VARIANTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, variant, dtypes):
    for shape in cases.FEW_SHAPES:
        want = expected(shape, variant.name, dtypes)
        assert_matches(run(want.rows, variant, backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend):
    """A captured step reads nothing on the host: its replay computes the loss of the logits that are there then."""
    rows = cases.make_rows(64, 100)
    student, teacher, target = (t.to(DEVICE) for t in rows)
    student.requires_grad_()

    def step():
        student.grad = None
        loss = sortkd_kernels.fused_sort_kd(student, teacher, target, backend=backend)
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
    graph.replay()
    replayed = loss.clone(), grad.clone()
    assert torch.equal(replayed[0], step()) and torch.equal(replayed[1], student.grad)


@pytest.mark.skipif(not INTERPRETED, reason="this is the child")
def test_compiled_triton():
    """This file again, in a process where Triton compiles."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__))]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
