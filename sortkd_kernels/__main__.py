"""`python -m sortkd_kernels`: what is installed and what runs here, to paste into an issue.

Each available backend computes a few rows on each device; the exit status is 1 where one of them is wrong or raises.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .backends import available_backends, build_info, choose
from .fused_sort_kd import fused_sort_kd

# Relative to the largest value. Rounding in float32 leaves some 1e-7; a wrong formula errs by more than 1e-3.
_TOLERANCE = 1e-5


def report() -> tuple[str, bool]:
    """The text, and whether every self-test passed."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator())
    lines = [
        f"sortkd_kernels {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}",
        f"{platform.platform()}, {platform.machine()}",
        f"build: {', '.join(f'{name} {value}' for name, value in build_info().items()) or 'no extension'}",
        "\nbackends",
    ]
    for name, state in available_backends().items():
        lines.append(f"  {name:9} {'available' if state.available else 'not available'}: {state.reason}")
    lines.append("\ndevices")
    lines += [f"  {_describe(device)}; default backend {_default(device)}" for device in devices]
    lines.append("\nself-test: loss and gradient of 8 x 100 float32 logits against the reference in float64")
    passed = True
    for name, state in available_backends().items():
        here = [device for device in devices if {device.type, "any"} & set(state.devices)]
        for device in here:
            text, good = _check(name, device)
            lines.append(f"  {name:9} on {device.type}: {text}")
            passed &= good
        if state.available and not here:
            lines.append(f"  {name:9} not run: it needs {' or '.join(state.devices)}, which is not here")
    return "\n".join(lines), passed


def _check(backend: str, device: torch.device) -> tuple[str, bool]:
    """The self-test of one backend on one device; a kernel that cannot run is a finding, and not a traceback."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 100, generator=generator, dtype=torch.float64).float()
    target = torch.arange(8)
    target[7] = -100  # a row that does not count
    expected = _loss_and_gradient(student.double(), teacher.double(), target, "reference")
    start = time.perf_counter()
    try:
        result = _loss_and_gradient(student.to(device), teacher.to(device), target.to(device), backend)
    except Exception as error:  # of the compiler, the driver or the kernel
        return f"FAILED, {type(error).__name__}: {str(error).strip()}", False
    milliseconds = 1000 * (time.perf_counter() - start)
    difference = max(((got - e).abs().max() / e.abs().max()).item() for got, e in zip(result, expected, strict=True))
    good = difference < _TOLERANCE  # so written, NaN fails too
    return f"{'ok' if good else 'WRONG'}, relative error {difference:.1e}, first call {milliseconds:.0f} ms", good


def _loss_and_gradient(student: Tensor, teacher: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    student = student.requires_grad_()
    loss: Any = fused_sort_kd(student, teacher, target, ce_weight=0.1, kd_weight=0.9, backend=backend)
    loss.backward()
    return loss.detach().cpu().double(), student.grad.cpu().double()


def _default(device: torch.device) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fallback, which this report shows anyway
        return choose("python -m sortkd_kernels", None, device)


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"cuda, {torch.cuda.device_count()} x {properties.name}, sm_{properties.major}{properties.minor}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    text, passed = report()
    sys.stdout.write(text + "\n")
    sys.exit(not passed)
