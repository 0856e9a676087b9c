"""Which backends there are on this machine, why one is missing, and which one a call uses.

| backend     | device       | needs                           | role                                             |
|-------------|--------------|---------------------------------|--------------------------------------------------|
| `native`    | CPU, CUDA    | the compiled extension          | default where it is built for the device         |
| `triton`    | CUDA, ROCm   | triton (CPU: its interpreter)   | default on GPUs without a native build           |
| `reference` | any          | torch                           | the oracle; the fallback elsewhere, with a warning |
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch


def _load_extension() -> tuple[Any, str]:
    """The compiled module, or None and why it is not there."""
    record = Path(__file__).parents[1] / "_C.torch"  # setup.py writes the version of the torch that it built with
    built, here = record.read_text() if record.exists() else torch.__version__, torch.__version__
    # The C++ side of autograd changes with each minor version, not always by a symbol whose absence would be noticed.
    if built.split(".")[:2] != here.split(".")[:2]:
        reason = (
            f"the compiled extension was built with torch {built} and this is torch {here}; build it again in the "
            "checkout (`pip install --no-build-isolation --no-deps --force-reinstall .`) or install this torch's wheel"
        )
        warnings.warn(f"sortkd_kernels runs on its other backends: {reason}", stacklevel=2)
        return None, reason
    try:
        return importlib.import_module("sortkd_kernels._C"), ""
    except ImportError as error:  # no compiler at install time
        return None, f"the compiled extension is not there ({error})"


_C, _NO_EXTENSION = _load_extension()
NAMES = ("native", "triton", "reference")


class BackendState(NamedTuple):
    """Whether a backend can run here, on which device types, and the reason where it cannot."""

    available: bool
    devices: tuple[str, ...]
    reason: str


def available_backends() -> dict[str, BackendState]:
    """The state of each backend, by name, on this machine. Starts no device and compiles nothing."""
    states = dict(_STATES)
    native = states["native"]
    # Counted now and not at import: the count asks the driver. NVML answers without starting a device.
    if "cuda" in native.devices and not torch.cuda.device_count():
        native = native._replace(devices=("cpu",), reason=f"{native.reason}; no CUDA device here, or no driver for it")
    return states | {"native": native}


def build_info() -> dict[str, Any]:
    """Facts of the compiled extension; empty where it is not built.

    ``cpu_capability`` in use, ``cpu_capabilities`` carried, ``compiler``, and ``cuda``: the architectures that the CUDA
    kernels are compiled for, or False.
    """
    return {} if _C is None else _C.build_info()


def extension() -> Any:
    """The compiled module; only where ``native`` is available."""
    return _C


def choose(fn: str, backend: str | None, device: torch.device) -> str:
    """The backend of one call: ``backend`` by name, which never falls back, or the device's default.

    Raises:
        ValueError: ``backend`` is not a name of this package.
        RuntimeError: the named backend cannot run on ``device``; the message has the reason.
    """
    if backend is None:
        return _default_on(device) if device.type == "cuda" else _default(device.type)
    if backend not in NAMES:
        raise ValueError(f"{fn}: expected backend to be one of {', '.join(map(repr, NAMES))} or None, got {backend!r}")
    problem = _problem(backend, device.type)
    if problem:
        raise RuntimeError(f"{fn}: backend {backend!r} cannot run on {device.type}: {problem}")
    return backend


def _default_on(device: torch.device) -> str:
    """The default on a CUDA device: native kernels are compiled for some architectures, Triton's for the one there."""
    name = _default("cuda")
    # A graph is traced for the device that compiles it, whose capability the tracer does not follow.
    if name == "native" and not torch.compiler.is_compiling() and _is_too_old(device.index):
        return "reference" if _problem("triton", "cuda") else "triton"
    return name


@functools.cache
def _is_too_old(device: int | None) -> bool:
    oldest = min(int(architecture.removeprefix("sm_")) for architecture in build_info()["cuda"])
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor < oldest


def _default(device: str) -> str:
    if device in _DEFAULTS:
        return _DEFAULTS[device]
    if device not in _WARNED and not torch.compiler.is_compiling():
        _WARNED.add(device)
        warnings.warn(
            f"sortkd_kernels: no compiled backend for {device} ({_problem('native', device)}); using the PyTorch "
            "reference, which is correct and slow",
            stacklevel=5,
        )
    return "reference"


def _problem(name: str, device: str) -> str:
    state = _STATES[name]
    if not state.available:
        return state.reason
    if "any" not in state.devices and device not in state.devices:
        return f"it runs on {', '.join(state.devices)}"
    return ""


def _native_state() -> BackendState:
    if _C is None:
        return BackendState(False, (), _NO_EXTENSION)
    info = _C.build_info()
    reason = f"CPU kernels for {info['cpu_capability']}"
    if not info["cuda"]:
        return BackendState(True, ("cpu",), f"{reason}; built without CUDA kernels")
    return BackendState(True, ("cpu", "cuda"), f"{reason}; CUDA kernels for {', '.join(info['cuda'])}")


def _triton_state() -> BackendState:
    if importlib.util.find_spec("triton") is None:
        return BackendState(False, (), "triton is not installed")
    # Triton 3.4 gives an atomic's result to one thread alone. A torch is made for one minor version of triton.
    if torch.__version__ < (2, 9):
        reason = f"needs triton 3.5, that of torch 2.9, or newer; this is torch {torch.__version__}"
        return BackendState(False, (), reason)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return BackendState(True, ("cpu",), "under the Triton interpreter (TRITON_INTERPRET=1)")
    return BackendState(True, ("cuda",), "compiled by triton at the first call")


# Fixed at import: triton reads its environment then too, and torch.compile can trace a constant.
_STATES = {
    "native": _native_state(),
    "triton": _triton_state(),
    "reference": BackendState(True, ("any",), "PyTorch ops on any device"),
}
# The Triton interpreter is a test instrument, thousands of times slower on a CPU than the reference: never a default.
_DEFAULTS = {
    device: name
    for name, devices in (("triton", ("cuda",)), ("native", ("cpu", "cuda")))
    for device in devices
    if not _problem(name, device)
}
_WARNED: set[str] = set()
