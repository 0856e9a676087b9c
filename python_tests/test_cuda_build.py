"""The extension built by nvcc: for which GPUs, what is in it, and that it imports where there is no driver."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import sortkd_kernels
from sortkd_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
ALL = [80, 90, 100, 120]
FACTS = """
import json, torch, sortkd_kernels as k
registered = torch._C._dispatch_has_kernel_for_dispatch_key
ops = [registered(f"sortkd_kernels::{op}", "CUDA") for op in ("sort_kd_forward", "sort_logits")]
assert not torch.cuda.is_initialized()
print(json.dumps([k.__file__, k.build_info(), ops, k.available_backends()["native"]]))
"""


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """setup.py as a function of SORTKD_CUDA, TORCH_CUDA_ARCH_LIST and the GPUs: the architectures that it builds for."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' 75 89 86 {' '.join(map(str, ALL))}\n")
    nvcc.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))

    def architectures(wanted: str, listed: str, gpus: list[tuple[int, int]]) -> list[int]:
        monkeypatch.setenv("SORTKD_CUDA", wanted)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
        called = {}
        monkeypatch.setattr(setuptools, "setup", called.update)
        runpy.run_path("setup.py")
        (extension,) = called["ext_modules"]
        codes = " ".join(extension.extra_compile_args.get("nvcc", []))
        found = [int(arch) for arch in re.findall(r"code=sm_(\d+)", codes)]
        # The macro, the PTX for GPUs in between and later ones, and the sources all say the same.
        flags = extension.extra_compile_args["cxx"]
        assert (f"-DSORTKD_CUDA={','.join(map(str, found))}" in flags) == bool(found)
        assert re.findall(r"code=compute_(\d+)", codes) == [str(arch) for arch in dict.fromkeys(found[:1] + found[-1:])]
        assert any(name.endswith(".cu") for name in extension.sources) == bool(found)
        return found

    return architectures


@pytest.mark.parametrize(
    ("wanted", "listed", "gpus", "expected"),
    [
        ("", "", [], []),
        ("", "", [(9, 0), (8, 6), (9, 0)], [86, 90]),
        ("", "", [(7, 5)], []),  # older than the kernels need
        ("", "", [(12, 1)], [120]),  # newer than nvcc knows: the PTX of the newest that it does
        ("", "8.0;9.0+PTX", [], [80, 90]),
        ("", "8.0 8.9", [(9, 0)], [80, 89]),
        ("0", "9.0", [(9, 0)], []),
        ("1", "", [(9, 0)], [90]),
        ("1", "", [], ALL),
        ("all", "", [(9, 0)], ALL),
        ("all", "9.0a", [], [90]),
    ],
)
def test_architectures(setup, wanted, listed, gpus, expected):
    assert setup(wanted, listed, gpus) == expected


def test_what_is_asked_for_is_never_left_out(setup, monkeypatch, capfd):
    """An error that says what is missing, in place of an extension without kernels."""
    with pytest.raises(RuntimeError, match=r"SORTKD_CUDA=1: no GPU of compute capability 8\.0"):
        setup("1", "", [(7, 5)])
    with pytest.raises(RuntimeError, match="expected SORTKD_CUDA to be 0, 1 or all, got 'yes'"):
        setup("yes", "", [])
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(RuntimeError, match="SORTKD_CUDA=all: nvcc is neither on PATH nor in CUDA_HOME"):
        setup("all", "", [])
    assert setup("", "9.0", []) == []

    def too_old(index):
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "get_device_capability", too_old)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SORTKD_CUDA", "")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    runpy.run_path("setup.py")  # built without CUDA kernels
    assert "too old" in capfd.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match=r"SORTKD_CUDA=1: torch \S+ is not a CUDA build"):
        setup("1", "", [])


@pytest.fixture(scope="module")
def built() -> tuple[Path, dict, list, list]:
    """The file of an extension with CUDA kernels, and what it says of itself: the one in use, or one built for sm_90."""
    package = ROOT
    if not sortkd_kernels.build_info().get("cuda"):
        if torch.version.cuda is None or shutil.which("nvcc") is None:
            pytest.skip("no nvcc, or no CUDA build of torch")
        folder = ROOT / "build" / "cuda"
        package = folder / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"SORTKD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder), "--build-lib", str(package)]
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # test processes beside each other share the build
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    # -P: the current folder, which is a checkout, stays off the path.
    command = [sys.executable, "-P", "-c", FACTS]
    environment = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    origin, info, registered, state = json.loads(done.stdout)
    (file,) = Path(origin).parent.glob("_C.*.so")
    return file, info, registered, state


def shown(tool: str, *arguments: object) -> str:
    """What one of the tools that come with CUDA, and with triton, says."""
    triton = importlib.util.find_spec("triton")
    path = shutil.which(tool) or (triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / tool)
    if not path or not Path(path).exists():
        pytest.skip(f"{tool} is neither on PATH nor in triton's wheel")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_machine_code_for_each_architecture_and_ptx_for_the_next(built):
    file, info, _, _ = built
    assert info["cuda"]
    elf, ptx = shown("cuobjdump", "--list-elf", file), shown("cuobjdump", "--list-ptx", file)
    for architecture in info["cuda"]:
        # Each source has kernels: rows of three dtypes, all other rows, the labels' count, sort_logits and the scaling.
        assert len(re.findall(rf"\.{architecture}\.cubin", elf)) == len(list(CUDA.glob("*.cu"))), architecture
    assert re.search(rf"\.{info['cuda'][-1]}\.ptx", ptx)


def test_it_needs_torchs_libraries_and_no_driver(built):
    said = shown("readelf", "-d", built[0])
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", said)
    assert any(name.startswith("libcudart.so") for name in needed)
    assert not any(name.startswith("libcuda.so") for name in needed)
    assert not re.findall(r"\((?:RPATH|RUNPATH)\).*", said), "libcudart is torch's, wherever that is"


def test_the_ops_are_registered_and_say_where_they_run(built):
    _, info, registered, (available, devices, reason) = built
    assert registered == [True, True] and available
    assert f"CUDA kernels for {', '.join(info['cuda'])}" in reason
    if not torch.cuda.is_available():
        assert devices == ["cpu"] and reason.endswith("no CUDA device here, or no driver for it")


def test_native_is_the_default_on_cuda(monkeypatch):
    """... from the oldest architecture on that it is compiled for; below that Triton compiles for what is there."""
    monkeypatch.setitem(backends._DEFAULTS, "cuda", "native")
    monkeypatch.setattr(backends, "build_info", lambda: {"cuda": ("sm_90", "sm_80")})
    monkeypatch.setitem(backends._STATES, "triton", backends.BackendState(True, ("cuda",), "as without a GPU"))
    device = torch.device("cuda", 0)
    for capability, expected in (((8, 0), "native"), ((9, 0), "native"), ((12, 1), "native"), ((7, 5), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        backends._is_too_old.cache_clear()
        assert backends.choose("fn", None, device) == expected
    backends._is_too_old.cache_clear()


def test_importing_asks_no_driver():
    """NVML or not, nothing may start at import: a process that forks afterwards could not use CUDA."""
    code = "import torch, sortkd_kernels as k; k.build_info(); assert not torch.cuda.is_initialized(); print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_nothing_in_the_sources_waits_for_the_device():
    """No synchronization, no copy to the host, no allocation: calls that a CUDA graph could not capture either."""
    banned = r"Synchronize\(|cudaMemcpy|cudaMalloc|cudaFree|\.item|\.cpu\(\)|cudaEventQuery|cudaStreamQuery"
    for path in (*CUDA.iterdir(), ROOT / "csrc" / "ops.cpp"):
        found = re.search(banned, path.read_text())
        assert not found, f"{path.name}: {found and found[0]}"
