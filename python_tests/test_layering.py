"""The arrows of the design, read from the imports and includes, and the calls that the package does without."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sortkd_kernels"

# Module -> what it may import of the package. A backend stands on torch, triton and the extension alone.
ALLOWED = {
    "__init__": {"backends", "fused_sort_kd", "losses"},
    "fused_sort_kd": {"backends", "checks", "ops"},
    "losses": {"fused_sort_kd"},
    "ops": {"backends", "checks", "reference", "triton_ops"},
    "triton_ops": {"backends"},
    "checks": set(),
    "reference": set(),
    "backends/__init__": set(),
}
# Header or source -> what it may include of csrc.
INCLUDES = {
    "launch.h": set(),
    "row_math.h": set(),
    "preconditions.h": set(),
    "ops.h": set(),
    "ops.cpp": {"ops.h", "launch.h"},
    "autograd.cpp": {"ops.h"},
    "cpu/forward.cpp": {"ops.h", "launch.h", "preconditions.h"},
    "cpu/dispatch.cpp": {"launch.h"},
    "cpu/simd.h": set(),
    "cpu/row.h": {"cpu/simd.h"},
    "cpu/row_io.h": {"cpu/simd.h"},
    "cpu/order.h": {"launch.h", "cpu/row.h"},
    "cpu/row_loss.h": {"row_math.h", "cpu/order.h", "cpu/simd.h"},
    "cpu/rows.cpp": {"cpu/row_io.h", "cpu/row_loss.h"},
}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their names in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sortkd_kernels"):
            found.add(node.module.removeprefix("sortkd_kernels").lstrip(".").split(".")[0] or "__init__")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sortkd_kernels")}
    return found


def test_every_module_has_its_arrows():
    modules = {str(p.relative_to(PACKAGE).with_suffix("")) for p in PACKAGE.rglob("*.py")}
    assert {m for m in modules if not m.startswith("backends/triton/")} == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports(module):
    assert imports_of(PACKAGE / f"{module}.py") <= ALLOWED[module]


def test_the_triton_kernels_know_nothing_of_the_package_around_them():
    inside = {p.stem for p in (PACKAGE / "backends" / "triton").glob("*.py")} | {"launch"}
    for path in (PACKAGE / "backends" / "triton").glob("*.py"):
        assert imports_of(path) <= inside, path.name


def test_includes():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert {str(p.relative_to(ROOT / "csrc")) for p in files} == set(INCLUDES)
    for path in files:
        name = str(path.relative_to(ROOT / "csrc"))
        included = re.findall(r'#include "([^"]+)"', path.read_text())
        resolved = {str((path.parent / i).resolve().relative_to(ROOT / "csrc")) for i in included}
        assert resolved <= INCLUDES[name], name


def test_the_trainer_uses_public_names_alone():
    for path in (ROOT / "train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sortkd_kernels"):
                assert node.module == "sortkd_kernels", f"{path.name}: {node.module}"
                assert not any(alias.name.startswith("_") for alias in node.names), path.name


def test_nothing_synchronises_a_device():
    """`.item()`, `.tolist()` and `torch.equal` wait for a GPU. The checks of labels look at CPU tensors alone."""
    banned = re.compile(r"\.item\(|\.tolist\(|\.cpu\(|\.nonzero\(|torch\.equal|\.synchronize\(")
    for path in PACKAGE.rglob("*.py"):
        for line in path.read_text().splitlines():
            if banned.search(line):
                assert path.name in ("ops.py", "layout.py") and "wrong.nonzero()" in line, (
                    f"{path.name}: {line.strip()}"
                )
