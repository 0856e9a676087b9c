"""What all tests share: backends installed for a test, poisoned memory, and a clean compiler."""

from __future__ import annotations

import os

# Before anything imports triton: its kernels then run on CPU tensors, and the backend joins the tables of cases.py.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import sortkd_kernels


def pytest_configure(config: pytest.Config) -> None:
    # NumPy's, inside Triton's interpreter, where the kernels mean infinity and NaN.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_sessionstart() -> None:
    # The tensors are small: a second thread would wait more than it computes, ten times slower on a shared machine.
    # test_determinism.py holds the results of two threads equal to these, bit by bit.
    torch.set_num_threads(1)
    # A run that is meant for one instruction set (test_capabilities.py) must not pass on another.
    wanted, present = os.environ.get("SORTKD_EXPECT_CAPABILITY"), sortkd_kernels.build_info().get("cpu_capability")
    if wanted and wanted != present:
        pytest.exit(f"this run is for the {wanted} kernels, but {present} are in use", returncode=3)


@pytest.fixture(autouse=True)
def simt(request: pytest.FixtureRequest):
    """For a test of the backend "simt": the CUDA kernels under that name, on memory with guarded ends."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or "simt" not in parameters.params.values():
        yield
        return
    from simt import backend

    with backend.installed() as harness:
        yield harness


@pytest.fixture
def poisoned_memory():
    """Fresh memory is NaN (integers: the maximum), in C++ too: an output that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fresh_compiler():
    """No graph of another test is reused, and none of this one's is left."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def two_threads():
    """Two threads whatever the machine's default, so that rows are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
