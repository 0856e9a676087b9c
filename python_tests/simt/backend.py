"""The CUDA kernels of csrc/cuda on CPU tensors, under the SIMT harness, as one more backend of the tests: "simt".

The very sources of the extension are compiled: schemas, autograd, the CUDA forward, the kernels. The package knows
nothing of it: its tables have the name only while a test that runs on it does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from sortkd_kernels import backends, ops

from . import build

NAME = "simt"
CSRC = build.HERE.parent.parent / "csrc"
_libraries: list[torch.library.Library] = []  # the ops live as long as these


def sources() -> tuple[Path, ...]:
    cuda = CSRC / "cuda"
    return tuple(sorted((*CSRC.glob("*.cpp"), *cuda.glob("*.cpp"), *cuda.glob("*.cu"), build.HERE / "module.cpp")))


@functools.cache
def modules() -> tuple[ModuleType, ModuleType]:
    """The extension module, its ops registered as `sortkd_simt`, and the harness's own module of the same library."""
    from torch.utils import cpp_extension  # half a second, which only a test of these kernels spends

    include = tuple(f"-isystem{path}" for path in cpp_extension.include_paths())
    libraries = [f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    link = (*libraries, "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python")
    extension = build.load("sortkd_simt", sources(), include, link)
    spec = importlib.util.spec_from_file_location("sortkd_simt_harness", extension.__file__)
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    _libraries.append(ops.define("sortkd_simt"))
    return extension, harness


@contextlib.contextmanager
def installed() -> Iterator[ModuleType]:
    """The backend under its name, threads and blocks shuffled, the same way for each test; every tensor made meanwhile
    ends right before memory that nobody may touch.

    Raises:
        RuntimeError: the compiler's words where the kernels do not build.
    """
    extension, harness = modules()
    names = backends.NAMES
    backends.NAMES += (NAME,)
    backends._STATES[NAME] = backends.BackendState(True, ("cpu",), "the CUDA kernels under the SIMT harness")
    ops.register_native(NAME, extension, "sortkd_simt")
    harness.settings.order, harness.settings.seed = harness.Order.shuffled, 1
    harness.guard(True)
    try:
        yield harness
    finally:
        harness.guard(False)
        backends.NAMES = names
        del backends._STATES[NAME]
        for table in (ops.LOSS, ops.EAGER_LOSS, ops.SORT_LOGITS, ops.KERNELS):
            del table[NAME]
    assert not harness.damaged(), "a kernel has written before the start of a tensor"
