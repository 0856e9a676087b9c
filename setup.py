"""Builds `sortkd_kernels._C`; where no C++ compiler works, installs the package without it and says so.

The CUDA kernels are built where nvcc and a CUDA build of torch are. SORTKD_CUDA=0 leaves them out; with SORTKD_CUDA=1
it is an error if they cannot be built, in place of an extension for the CPU alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

ROWS = "csrc/cpu/rows.cpp"
SOURCES = ["csrc/ops.cpp", "csrc/autograd.cpp", "csrc/forward.cpp", "csrc/cpu/launcher.cpp"]
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
# A100, RTX 30, RTX 40, H100, B200, RTX 50. Later processors compile the last one's PTX.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = os.environ.get("SORTKD_SANITIZE") == "1"

# The row loop is built for each of these; the one that fits the processor is chosen at run time. ATen's vectors read
# the two macros; the flags are the ones that ATen's own kernels are built with.
CAPABILITIES: dict[str, list[str]] = {"DEFAULT": []}
if X86:
    CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["AVX512"] = [*CAPABILITIES["AVX2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]

# The two silenced warnings come from ATen's and the compiler's own vector headers.
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
# at::parallel_for is a template over OpenMP: without the flag it silently runs on one thread. Apple's clang has none.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]


class Toolkit(NamedTuple):
    """Where the CUDA toolkit is, or the wheels that torch comes with and that hold parts of it."""

    home: Path
    include: Path
    runtime: Path  # libcudart, as a shared library
    architectures: tuple[int, ...]


def extension_arguments() -> dict[str, object]:
    """The `ext_modules` and `cmdclass` of `setup`, or nothing where torch's build tools are missing."""
    if importlib.util.find_spec("torch") is None:
        say_missing("torch is not importable in the build environment; use `pip install --no-build-isolation .`")
        return {}
    toolkit = find_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # read when cpp_extension is imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildPerCapability(BuildExtension):
        """Compiles the row loop once for each instruction set, then the extension around the objects."""

        def build_extension(self, ext: CppExtension) -> None:
            # After the ordinary objects on the link line: of an inline function that several hold, the linker takes
            # the first, and that one must run on every processor.
            objects = []
            for capability, flags in CAPABILITIES.items():
                for acc in ("float", "double"):
                    objects += self.compiler.compile(
                        [ROWS],
                        output_dir=str(Path(self.build_temp) / f"{capability}-{acc}"),
                        include_dirs=ext.include_dirs,
                        extra_postargs=[
                            *ext.extra_compile_args["cxx"],
                            *flags,
                            f"-DCPU_CAPABILITY={capability}",
                            f"-DCPU_CAPABILITY_{capability}",
                            f"-DSORTKD_ACC={acc}",
                        ],
                    )
            ext.extra_objects = objects
            super().build_extension(ext)

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if set(CUDA_SOURCES) <= set(extension.sources) and os.environ.get("SORTKD_CUDA") != "1":
                    say(f"the CUDA kernels were not built ({reason}); trying without them")
                    without_cuda(extension)
                    return self.run()
                if "1" in (os.environ.get("SORTKD_REQUIRE_EXTENSION"), os.environ.get("SORTKD_CUDA")):
                    raise
                self.extensions = []
                say_missing(reason)

    sanitizer = SANITIZER if SANITIZE else []
    extension = CppExtension(
        "sortkd_kernels._C",
        SOURCES,
        define_macros=[("SORTKD_X86", None)] if X86 else [],
        extra_compile_args={"cxx": [*FLAGS, *OPENMP, *sanitizer]},
        extra_link_args=[*OPENMP, *sanitizer],
    )
    if toolkit:
        with_cuda(extension, toolkit)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildPerCapability}}


def with_cuda(extension: Extension, toolkit: Toolkit) -> None:
    """Add the CUDA kernels to an extension."""
    listed = ",".join(map(str, toolkit.architectures))
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in toolkit.architectures]
    codes.append(f"-gencode=arch=compute_{toolkit.architectures[-1]},code=compute_{toolkit.architectures[-1]}")
    extension.sources += CUDA_SOURCES
    extension.include_dirs.append(str(toolkit.include))
    extension.extra_compile_args["cxx"].append(f"-DSORTKD_CUDA={listed}")  # nvcc would take the commas for its own
    # Two architectures at a time beside ninja's files: what a machine of two cores takes. Quotients of floats to two units in
    # the last place, in half as many instructions: each lane computes its row's.
    extension.extra_compile_args["nvcc"] = ["-O3", "-std=c++20", "-prec-div=false", "--threads", "2", *codes]
    # torch has loaded this library before the extension asks for it.
    extension.extra_link_args += [f"-L{toolkit.runtime.parent}", f"-l:{toolkit.runtime.name}"]
    extension.libraries += ["c10_cuda"]


def without_cuda(extension: Extension) -> None:
    """Undo :func:`with_cuda`."""
    extension.sources = list(SOURCES)
    flags = extension.extra_compile_args["cxx"]
    extension.extra_compile_args["cxx"] = [flag for flag in flags if not flag.startswith("-DSORTKD_CUDA")]
    extension.extra_link_args = [arg for arg in extension.extra_link_args if not arg.startswith(("-L", "-l"))]
    extension.libraries = [name for name in extension.libraries if name != "c10_cuda"]


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit to build with, or None where there is none to be used.

    Raises:
        RuntimeError: SORTKD_CUDA=1 asks for a build that is not possible; the message has what is missing.
    """
    wanted = os.environ.get("SORTKD_CUDA")
    if wanted == "0" or SANITIZE:
        return None
    found, missing = _look_for_toolkit()
    if found is None and wanted == "1":
        raise RuntimeError(f"SORTKD_CUDA=1: {missing}")
    return found


def _look_for_toolkit() -> tuple[Toolkit | None, str]:
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not a CUDA build"
    # The wheels of the toolkit's parts lie beside torch: nvidia/cu13/{bin,include,lib}.
    wheels = sorted((Path(torch.__file__).parents[1] / "nvidia").glob("cu[0-9]*"), reverse=True)
    home = _home_of_nvcc([os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")], wheels)
    if home is None:
        return None, "nvcc is neither on PATH nor in CUDA_HOME"
    roots = [home, *home.glob("targets/*"), *wheels]
    include = [root / "include" for root in roots if (root / "include" / "cuda_runtime.h").exists()]
    runtimes = [path for root in roots for lib in ("lib64", "lib") for path in (root / lib).glob("libcudart.so.[0-9]*")]
    if not include or not runtimes:
        return None, f"no {'libcudart' if include else 'cuda_runtime.h'} under {', '.join(map(str, roots))}"
    command = [home / "bin" / "nvcc", "--list-gpu-arch"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = {int(arch) for arch in re.findall(r"compute_(\d+)", listed)}
    chosen = re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    asked = [int(major) * 10 + int(minor) for major, minor in chosen] or ARCHITECTURES
    architectures = tuple(arch for arch in asked if arch in known)
    if not architectures:
        return None, f"nvcc compiles for none of {', '.join(map(str, asked))}"
    return Toolkit(home, include[0], runtimes[0], architectures), ""


def _home_of_nvcc(variables: list[str | None], wheels: list[Path]) -> Path | None:
    """The folder whose bin/nvcc is the compiler itself; what is on PATH may be a script that calls it."""
    for home in [*(Path(variable) for variable in variables if variable), *wheels]:
        if (home / "bin" / "nvcc").exists():
            return home
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def say(words: str) -> None:
    """pip shows it with -v, and always where a build fails."""
    print(f"\nsortkd_kernels: {words}.\n", file=sys.stderr)  # noqa: T201


def say_missing(reason: str) -> None:
    """The install goes on without the extension; the package then runs on triton or the reference."""
    say(
        f"the compiled extension was not built ({reason}).\n"
        "The package works without it, on the `triton` or the `reference` backend; for the fast CPU kernels install a "
        "C++20 compiler and install again"
    )


setup(**extension_arguments())
