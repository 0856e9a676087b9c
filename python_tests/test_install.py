"""The package where no extension could be built, and what an import may not do: in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], cwd=path, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def without_extension(tmp_path):
    shutil.copytree(ROOT / "sortkd_kernels", tmp_path / "sortkd_kernels", ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def test_without_the_extension_the_reference_runs_and_says_so_once(without_extension):
    code = """
import sys, torch, warnings
# An editable install of the checkout would find its extension for this copy too.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import sortkd_kernels as sk
assert sk.__file__.startswith(PATH), sk.__file__
state = sk.available_backends()["native"]
assert not state.available and "No module named 'sortkd_kernels._C'" in state.reason, state
assert sk.build_info() == {}
s, t, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.tensor([0, 1, 2])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    sk.fused_sort_kd(s, t, y).backward()
    sk.sort_logits(t, y)
assert sum("no compiled backend" in str(w.message) for w in seen) == 1, seen
assert s.grad.isfinite().all()
try:
    sk.fused_sort_kd(s, t, y, backend="native")
except RuntimeError as error:
    print(error)
""".replace("PATH", repr(str(without_extension)))
    done = run(code, without_extension)
    assert done.returncode == 0, done.stderr
    assert "fused_sort_kd: backend 'native' cannot run on cpu: the compiled extension is not there" in done.stdout


def test_a_failing_compiler_leaves_a_working_install_that_says_so(tmp_path):
    """`build_ext` with a compiler that is not there: exit status 0, words on stderr, no extension."""
    build = tmp_path / "build"
    env = os.environ | {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    env.pop("SORTKD_REQUIRE_EXTENSION", None)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(build), "--build-lib", str(build / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sortkd_kernels: the compiled extension was not built" in done.stderr
    assert (build / "lib" / "sortkd_kernels" / "fused_sort_kd.py").exists()
    assert not list((build / "lib").rglob("*.so"))


def test_importing_starts_and_compiles_nothing():
    code = """
import sys, torch
import sortkd_kernels, sortkd_kernels.fused_sort_kd
assert "triton" not in sys.modules or "sortkd_kernels.backends.triton" not in sys.modules
assert not torch.cuda.is_initialized()
assert callable(sortkd_kernels.fused_sort_kd)
from sortkd_kernels.fused_sort_kd import SortKDOutput
"""
    done = run(code, ROOT)
    assert done.returncode == 0, done.stderr


def test_nothing_but_the_package_is_installed():
    """No `train`, `benchmarks` or `python_tests` in site-packages, and no part of the package left out."""
    listed = re.search(r"^packages = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "sortkd_kernels").rglob("__init__.py")}
    assert set(json.loads(listed[1])) == found
