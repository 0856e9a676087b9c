"""The arrows of the design, read from the imports and includes, and calls that have no place in the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from cases import FEW_VARIANTS

import sortkd_kernels

ROOT = Path(sortkd_kernels.__file__).parent.parent
PACKAGE, CSRC = ROOT / "sortkd_kernels", ROOT / "csrc"

# Module of the package: the modules of the package that it may import. `reference` is a backend like the others, so
# `ops` registers it.
ARROWS = {
    "__init__": {"backends", "fused_linear", "fused_sort_kd", "losses"},
    "__main__": {"__version__", "backends", "fused_sort_kd"},
    "fused_sort_kd": {"autograd", "backends", "checks", "ops", "ranks", "vocab_parallel"},
    "fused_linear": {"autograd", "backends", "checks", "fused_sort_kd", "ops", "ranks", "vocab_parallel"},
    "losses": {"fused_linear", "fused_sort_kd"},
    "ops": {"autograd", "backends", "checks", "reference"},
    "ranks": {"checks", "ops"},
    "vocab_parallel": {"autograd", "checks", "ops", "ranks", "reference", "row_math"},
    "row_math": {"reference"},
    "autograd": set(),
    "checks": set(),
    "reference": set(),
    "backends": {"_C"},
}
# Beyond the standard library.
THIRD_PARTY = {"backends": {"torch"}, "backends.triton": {"torch", "triton"}}
STANDARD = {
    "__future__", "collections", "functools", "importlib", "itertools", "json", "math", "numbers", "os", "pathlib",
    "platform", "re", "subprocess", "sys", "tempfile", "threading", "time", "typing", "warnings",
}  # fmt: skip

# Header or source of csrc: the files of csrc that it may include. ops.h is the bridge between schemas, autograd and
# forward.cpp; kernels.h the one to the kernels, which see no tensor.
BRIDGES = {"kernels.h", "loss_config.h", "row_math.h"}
INCLUDES = {
    "ops.cpp": {"ops.h", "kernels.h", "cuda/choices.h"},
    "autograd.cpp": {"ops.h"},
    "forward.cpp": {"ops.h", "kernels.h"},
    "ops.h": {"loss_config.h"},
    "kernels.h": {"loss_config.h"},
    "row_math.h": {"loss_config.h"},
    "loss_config.h": set(),
}
# What the row kernels may use of PyTorch: vectors, threads, number types.
KERNEL_HEADERS = r"c10/util|ATen/(cpu/vec/vec\.h|Parallel\.h|Version\.h)|cuda|curand|cub/"


def imports(path: Path) -> list[tuple[str, ...]]:
    """Every import of a file, as the dotted parts of the full name."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found += [(*base, alias.name) for alias in node.names]
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "__init__" if parts == ("__init__",) else ".".join(p for p in parts if p != "__init__")


PYTHON = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


@pytest.mark.parametrize("layer", (*ARROWS, "backends.triton"))
def test_python_arrows(layer):
    for path in PYTHON:
        module = module_of(path)
        if layer != ("backends.triton" if module.startswith("backends.triton") else module):
            continue
        for name in imports(path):
            if name[0] == "sortkd_kernels":
                if layer == "backends.triton":
                    assert name[1:3] == ("backends", "triton"), f"{module} imports {'.'.join(name)}"
                else:
                    assert name[1] in ARROWS[module], f"{module} imports {'.'.join(name)}"
            else:
                allowed = THIRD_PARTY.get(layer, {"torch"}) | STANDARD
                assert name[0] in allowed, f"{module} imports {'.'.join(name)}"


def test_every_module_has_its_arrows():
    modules = {module_of(p).split(".")[0] for p in PYTHON}
    assert modules == set(ARROWS)


def test_training_uses_public_names():
    files = sorted((ROOT / "train").rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            assert name[0] not in ("benchmarks", "python_tests"), path
            if name[0] == "sortkd_kernels":
                assert name[1:] == () or (len(name) == 2 and name[1] in sortkd_kernels.__all__), (path, name)
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "sortkd_kernels"
            ):
                assert node.attr in (*sortkd_kernels.__all__, "__version__"), path


@pytest.mark.parametrize("folder", ("", "cpu/", "cuda/"))
def test_native_arrows(folder):
    files = [p for p in NATIVE if str(p.parent.relative_to(CSRC)) + "/" == (folder or "./")]
    assert files
    for path in files:
        check_includes(path, folder)


def check_includes(path, folder):
    name = str(path.relative_to(CSRC))
    kernel = folder and name not in INCLUDES
    for brackets, header in re.findall(r'#include ([<"])([^>"]+)[>"]', path.read_text()):
        if brackets == '"':
            target = str((path.parent / header).resolve().relative_to(CSRC))
            own = kernel and target.startswith(folder)
            assert own or target in INCLUDES.get(name, BRIDGES), f"{name} includes {target}"
        elif kernel and re.match(r"torch/|ATen/|c10/|cu", header):
            assert re.match(KERNEL_HEADERS, header), f"{name} includes {header}: a row kernel sees no tensor"
        elif name in BRIDGES:
            assert re.fullmatch("[a-z_]+", header), f"{name} includes {header}"
        if path.suffix in (".cu", ".cuh"):
            assert not re.match(r"torch/|ATen/", header), f"{name} includes {header}: nvcc takes minutes over it"


# Calls that wait for a device, copy from it, or read a value into Python.
SYNCHRONISING = {"item", "tolist", "equal", "allclose", "cpu", "numpy", "nonzero", "synchronize", "argwhere", "unique"}
# The first returns at once for any device but the CPU, whose values may be looked at. The others say so in their
# docstrings: the rows of a matrix product, and how much ranks send each other, are numbers of the host.
MAY_WAIT = {("ops", "check_labels"), ("fused_linear", "_rows_to_keep")}
MAY_WAIT |= {("ranks", "on_host"), ("vocab_parallel", "_rotate")}
# It reports on this machine: it runs on no user's tensor.
TOOLS = {"__main__"}


def test_no_call_waits_for_a_device():
    for path in PYTHON:
        if module_of(path) not in TOOLS:
            check_calls(path)


def check_calls(path):
    module, tree = module_of(path), ast.parse(path.read_text())
    excused = [
        range(f.lineno, f.end_lineno + 1)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and (module, f.name) in MAY_WAIT
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SYNCHRONISING:
            assert any(node.lineno in lines for lines in excused), f"{module}:{node.lineno} calls .{node.func.attr}()"
        # -O removes it, and its message is for programmers.
        assert not isinstance(node, ast.Assert), f"{module}:{node.lineno} has an assert statement"


@pytest.mark.parametrize("variant", FEW_VARIANTS, ids=str)
def test_no_value_of_a_device_is_read(variant):
    """Tensors without values stand for a GPU's: a call that looked at one would raise."""
    with torch.device("meta"):
        student, teacher = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
        target = torch.zeros(6, dtype=torch.int64)
    temperature = variant.make_temperature(6)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.detach().to("meta").requires_grad_(temperature.requires_grad)
    loss = variant.function(student, teacher, target, temperature=temperature, backend="reference", **variant.options)
    loss.sum().backward()
    assert student.grad.shape == student.shape


def test_no_circle_of_imports():
    def reached(module: str, seen: frozenset[str]) -> None:
        assert module not in seen, f"{module} imports itself by way of {sorted(seen)}"
        for other in ARROWS.get(module, ()):
            reached(other, seen | {module})

    for module in ARROWS:
        reached(module, frozenset())
