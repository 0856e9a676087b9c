"""What an install leaves behind: without a compiler that works, and beside the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def test_nothing_but_the_package_is_installed():
    """No `train`, `benchmarks` or `python_tests` in site-packages, and no part of the package left out."""
    listed = re.search(r"^packages = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "sortkd_kernels").rglob("__init__.py")}
    assert set(json.loads(listed[1])) == found
