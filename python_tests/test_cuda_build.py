"""The extension built by nvcc: what is in it, that it imports where there is no driver, and who it says it runs for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sortkd_kernels
from sortkd_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
BUILDABLE = torch.version.cuda is not None and shutil.which("nvcc") is not None and os.environ.get("SORTKD_CUDA") != "0"
BUILT = sortkd_kernels.build_info().get("cuda", False)

needs_build = pytest.mark.skipif(
    not BUILT and not BUILDABLE, reason="built without CUDA kernels: no nvcc, no CUDA build of torch, or SORTKD_CUDA=0"
)
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def extension() -> str:
    return importlib.util.find_spec("sortkd_kernels._C").origin


def shown(tool: str, *arguments: str) -> str:
    """What one of the CUDA tools that come with triton says of the extension."""
    triton = importlib.util.find_spec("triton")
    path = shutil.which(tool) or (triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / tool)
    if not path or not Path(path).exists():
        pytest.skip(f"{tool} is neither on PATH nor in triton's wheel")
    return subprocess.run([path, *arguments, extension()], capture_output=True, text=True, check=True).stdout


@needs_build
def test_it_is_built_where_it_can_be():
    assert BUILT, "nvcc and a CUDA build of torch are here, and the extension has no CUDA kernels"
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert BUILT == ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@needs_build
def test_machine_code_for_each_architecture_and_ptx_for_the_next():
    elf, ptx = shown("cuobjdump", "--list-elf"), shown("cuobjdump", "--list-ptx")
    for architecture in BUILT:
        # Each source has kernels: rows of three dtypes, all other rows, the labels' count, sort_logits and the scaling.
        assert len(re.findall(rf"\.{architecture}\.cubin", elf)) == len(list(CUDA.glob("*.cu"))), architecture
    assert re.search(rf"\.{BUILT[-1]}\.ptx", ptx)


@needs_build
def test_it_needs_torchs_libraries_and_no_driver():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not on PATH")
    said = subprocess.run(["readelf", "-d", extension()], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", said)
    assert any(name.startswith("libcudart.so") for name in needed)
    assert not any(name.startswith("libcuda.so") for name in needed)
    assert not re.findall(r"\((?:RPATH|RUNPATH)\).*nvidia", said), "libcudart is torch's, wherever that is"


@needs_build
def test_the_ops_are_registered_for_cuda():
    for op in ("sort_kd_forward", "sort_logits"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sortkd_kernels::{op}", "CUDA")


@needs_build
@no_device
def test_without_a_device_it_says_so():
    state = sortkd_kernels.available_backends()["native"]
    assert state.available and state.devices == ("cpu",)
    assert "CUDA kernels for sm_80" in state.reason
    assert state.reason.endswith("no CUDA device here, or no driver for it")


@needs_build
def test_native_is_the_default_on_cuda(monkeypatch):
    """... from the oldest architecture on that it is compiled for; below that Triton compiles for what is there."""
    device = torch.device("cuda", 0)
    for capability, expected in (((8, 0), "native"), ((9, 0), "native"), ((12, 1), "native"), ((7, 5), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setitem(backends._STATES, "triton", backends.BackendState(True, ("cuda",), "as without a GPU"))
        backends._is_too_old.cache_clear()
        assert backends.choose("fn", None, device) == expected
    backends._is_too_old.cache_clear()


def test_importing_asks_no_driver():
    """NVML or not, nothing may start at import: a process that forks afterwards could not use CUDA."""
    code = "import torch, sortkd_kernels as k; k.build_info(); assert not torch.cuda.is_initialized(); print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_asked_for_it_is_never_left_out():
    """SORTKD_CUDA=1 with no nvcc to be found: an error that says what is missing, not an extension without kernels."""
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"SORTKD_CUDA": "1", "PATH": "/nonexistent"}
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(r"RuntimeError: SORTKD_CUDA=1: (nvcc is neither|torch .* is not a CUDA build)", done.stderr)
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"SORTKD_CUDA": "0"}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("sortkd_kernels")


def test_nothing_in_the_sources_waits_for_the_device():
    """No synchronization, no copy to the host, no allocation: calls that a CUDA graph could not capture either."""
    banned = r"Synchronize\(|cudaMemcpy|cudaMalloc|cudaFree|\.item|\.cpu\(\)|cudaEventQuery|cudaStreamQuery"
    for path in (*CUDA.iterdir(), ROOT / "csrc" / "ops.cpp"):
        found = re.search(banned, path.read_text())
        assert not found, f"{path.name}: {found and found[0]}"
