"""Builds the modules of the SIMT harness with ninja into `build/simt`; what has not changed is used again."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
OUTPUT = HERE.parent.parent / "build" / "simt"

# -O1: higher levels double the time to compile and gain a tenth of the time to run.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-DSORTKD_SIMT"]
# Device code only. sanitizer.h makes a fault of what these find.
CHECKS = ["-fsanitize=alignment,bounds,shift", "-fno-sanitize-recover=alignment,bounds,shift"]
DEVICE = ["-x", "c++", "-Wno-unknown-pragmas", *CHECKS]
# nvcc contracts a product and a sum to one rounding; so does this compiler where the processor can.
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    DEVICE.append("-mfma")


def missing() -> str:
    """Why the harness cannot be built here, or nothing."""
    if sys.platform != "linux":
        return f"the SIMT harness is written for Linux, not {sys.platform}"
    if compiler() is None:
        return "the SIMT harness needs a C++20 compiler: no c++, g++ or clang++ is on PATH"
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        return "the SIMT harness is built with ninja, which is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "the SIMT harness is built with pybind11, which is not installed"
    return ""


@functools.cache
def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def load(name: str, sources: tuple[Path, ...], flags: tuple[str, ...] = (), link: tuple[str, ...] = ()) -> ModuleType:
    """The extension module ``name``, built from ``sources`` if they, or what they include, have changed.

    Raises:
        RuntimeError: the compiler's words.
    """
    library = OUTPUT / f"{name}-{platform.machine()}" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if words := complaint(library, sources, flags, link):
        raise RuntimeError(f"{name} does not build:\n{words}")
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache  # a build that fails is not tried again by each of two thousand tests
def complaint(library: Path, sources: tuple[Path, ...], flags: tuple[str, ...], link: tuple[str, ...]) -> str:
    """Builds; the compiler's words if it fails, or nothing."""
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test runs beside each other share the build
        (folder / "build.ninja").write_text(rules(library, sources, flags, link))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        done = subprocess.run([*ninja, "-C", folder], text=True, capture_output=True)
    return done.stdout[-8000:] + done.stderr[-2000:] if done.returncode else ""


def rules(library: Path, sources: tuple[Path, ...], flags: tuple[str, ...], link: tuple[str, ...]) -> str:
    """The build in ninja's language; the compiler reports the headers that each source has included."""
    import pybind11

    include = (HERE / "include", sysconfig.get_path("include"), pybind11.get_include())
    common = [*FLAGS, *flags, *(f"-I{path}" for path in include)]
    lines = [
        "rule compile",
        f"  command = {compiler()} {' '.join(common)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared $in {' '.join(link)} -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source.parent.name}-{source.name}.o")
        lines += [
            f"build {objects[-1]}: compile {source}",
            f"  flags = {' '.join(DEVICE) if source.suffix == '.cu' else ''}",
        ]
    lines.append(f"build {library.name}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"
