"""What an install leaves behind: without a compiler that works, and beside the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

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


NATIVE = """
import shutil, torch, warnings
warnings.simplefilter("error")
import sortkd_kernels as sk
assert sk.__file__.startswith(PREFIX), sk.__file__
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang++", "nvcc", "ninja")))
assert sk.build_info()["cuda"] is False
teacher, target, grads = torch.randn(8, 100), torch.arange(8), []
for backend in ("native", "reference"):
    torch.manual_seed(0)
    student = torch.randn(8, 100, requires_grad=True)
    sk.fused_sort_kd(student, teacher, target, ce_weight=0.1, backend=backend).backward()
    grads.append(student.grad)
torch.testing.assert_close(*grads)
"""
ANOTHER_TORCH = """
import torch, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import sortkd_kernels as sk
assert sk.__file__.startswith(PREFIX), sk.__file__
reason = sk.available_backends()["native"].reason
assert f"built with torch 1.0.0 and this is torch {torch.__version__}" in reason, reason
assert "pip install --no-build-isolation" in reason, reason
assert [reason in str(w.message) for w in seen] == [True], seen
student = torch.randn(8, 100, requires_grad=True)
sk.fused_sort_kd(student, torch.randn(8, 100), torch.arange(8)).backward()
assert student.grad.isfinite().all()
"""


@pytest.mark.slow
def test_the_wheel(tmp_path):
    """`make wheel`, installed into a fresh environment where no compiler is on PATH; then as under another torch."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "SORTKD_", "PYTHONPATH"))}
    # In a tree that has been built in place or editable, which is the usual case, only the link is left to do.
    command = ["make", "wheel", f"PYTHON={sys.executable}", "VENV=", f"DIST={tmp_path / 'dist'}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (wheel,) = (tmp_path / "dist").iterdir()
    minor = ".".join(torch.__version__.split(".")[:2])
    assert re.fullmatch(rf"sortkd_kernels-[\d.]+\+torch{minor}-cp3\d+-cp3\d+-manylinux_2_\d+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if ".so" in name] == [name for name in names if "/_C." in name and ".so" in name]

    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    python = fresh / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, cwd=fresh, env=env, check=True)
    (packages,) = fresh.glob("lib/python*/site-packages")
    # torch itself, 5 GB, is the one that is here; the path is searched last, and no .pth file in it is read.
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))

    def run(code):
        code = code.replace("PREFIX", repr(str(fresh)))
        done = subprocess.run(
            [python, "-c", code], cwd=fresh, env={"PATH": ""}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    run(NATIVE)
    (packages / "sortkd_kernels" / "_C.torch").write_text("1.0.0")
    run(ANOTHER_TORCH)


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"SORTKD_CUDA": "0"}, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = [
        name for name in tracked if name.startswith(("csrc/", "sortkd_kernels/", "setup.py", "pyproject", "LICENSE"))
    ]
    assert "csrc/cpu/rows.cpp" in needed
    assert set(needed) - held == set()


def test_supported_versions_are_those_that_ci_tries():
    """The table of CONTRIBUTING.md, the matrix of each workflow and pyproject.toml name the same ones."""
    table = dict(re.findall(r"^\| (\w+) \| ([\d., ]+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    pythons, torches = table["Python"].split(", "), table["torch"].split(", ")
    for name, job in (("ci", "test"), ("release", "wheel")):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
        matrix = workflow["jobs"][job]["strategy"]["matrix"]
        assert matrix["python"] == pythons
        assert {*matrix["torch"], *(each["torch"] for each in matrix["include"])} == set(torches)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={pythons[0]}"' in project
    assert set(re.findall(r'"torch>=([\d.]+)"', project)) == {torches[0]}
