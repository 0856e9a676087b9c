"""Builds `sortkd_kernels._C`; where no C++ compiler works, installs the package without it and says so.

SORTKD_CUDA chooses the GPUs that the CUDA kernels are built for; TORCH_CUDA_ARCH_LIST names them one by one.

| SORTKD_CUDA | built for                                                                       |
|-------------|---------------------------------------------------------------------------------|
| not set     | the GPUs of this machine; without any, or without nvcc, the CPU alone           |
| 0           | the CPU alone                                                                   |
| 1           | the GPUs of this machine, all where there is none; an error where it cannot be  |
| all         | every architecture; an error where it cannot be                                 |
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROWS = "csrc/cpu/rows.cpp"
SOURCES = sorted(str(path) for path in Path("csrc").glob("**/*.cpp") if path != Path(ROWS))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
# A100, RTX 30 and 40 (which run the code of sm_80), H100, B200, RTX 50. Later ones compile the last one's PTX.
ARCHITECTURES = (80, 90, 100, 120)
CUDA = os.environ.get("SORTKD_CUDA", "")
X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = os.environ.get("SORTKD_SANITIZE") == "1"

# The row loop is built for each of these; the one that fits the processor is chosen at run time. ATen's vectors read
# the two macros; the flags are the ones that ATen's own kernels are built with.
CAPABILITIES: dict[str, list[str]] = {"DEFAULT": []}
if X86:
    CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["AVX512"] = [*CAPABILITIES["AVX2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]

# -g0: Python's own flags ask for debug information, which doubles the time that PyTorch's headers take. The two
# silenced warnings come from ATen's and the compiler's own vector headers.
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
# at::parallel_for is a template over OpenMP: without the flag it silently runs on one thread. Apple's clang has none.
# Not a flag of the link: the OpenMP in use must be the one that torch has loaded, whatever its name.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]


def extension_arguments() -> dict[str, object]:
    """The `ext_modules` and `cmdclass` of `setup`, or nothing where torch's build tools are missing."""
    if importlib.util.find_spec("torch") is None:
        say_missing("torch is not importable in the build environment; use `pip install --no-build-isolation .`")
        return {}
    architectures = find_architectures()  # before cpp_extension is imported, which reads CUDA_HOME
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildSideBySide(BuildExtension):
        """Compiles the row loop once for each instruction set, beside the other sources."""

        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:  # pip's choice is a fresh folder, which would compile everything again
                self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

        def build_extension(self, ext: Extension) -> None:
            compile_sources = self.compiler.compile

            def compile_all(sources: list[str], output_dir: str, **options: object) -> list[str]:
                # A ninja each, since the flags of one are those of all its sources.
                workers = int(os.environ.get("MAX_JOBS") or os.cpu_count()) if self.use_ninja else 1
                with ThreadPoolExecutor(workers) as pool:
                    calls = [pool.submit(compile_sources, sources, output_dir, **options)]
                    for (capability, target), acc in itertools.product(CAPABILITIES.items(), ("float", "double")):
                        macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
                        flags = [*ext.extra_compile_args["cxx"], *target, *macros, f"-DSORTKD_ACC={acc}"]
                        folder = str(Path(output_dir, f"{capability}-{acc}"))
                        calls.append(
                            pool.submit(compile_sources, [ROWS], folder, **options | {"extra_postargs": flags})
                        )
                # The rows come after the ordinary objects on the link line: of an inline function that several hold,
                # the linker takes the first, and that one must run on every processor.
                return [name for call in calls for name in call.result()]

            self.compiler.compile = compile_all
            super().build_extension(ext)

        def run(self) -> None:
            inplace = self.inplace  # setuptools loses it where the build fails
            try:
                super().run()
            except Exception as error:
                self.inplace = inplace
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                if architectures and not CUDA:
                    say(f"the CUDA kernels were not built ({reason}); trying without them")
                    architectures.clear()
                    vars(self.extensions[0]).update(vars(extension([])))
                    return self.run()
                if CUDA in ("1", "all") or os.environ.get("SORTKD_REQUIRE_EXTENSION") == "1":
                    raise
                self.extensions = []
                return say_missing(reason)
            # To be read before the extension is loaded: under another torch it fails to load, or worse, loads.
            Path("" if inplace else self.build_lib, "sortkd_kernels", "_C.torch").write_text(torch.__version__)

    return {"ext_modules": [extension(architectures)], "cmdclass": {"build_ext": BuildSideBySide}}


def extension(architectures: list[int]) -> Extension:
    """`sortkd_kernels._C`, with the CUDA kernels where there are architectures to compile them for."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sanitizer = SANITIZER if SANITIZE else []
    arguments = {
        "define_macros": [("SORTKD_X86", None)] if X86 else [],
        "extra_compile_args": {"cxx": [*FLAGS, *OPENMP, *sanitizer]},
        "extra_link_args": sanitizer,
    }
    if not architectures:
        return CppExtension("sortkd_kernels._C", list(SOURCES), **arguments)
    # Not a macro for nvcc too, which would take the commas for its own.
    arguments["extra_compile_args"]["cxx"].append(f"-DSORTKD_CUDA={','.join(map(str, architectures))}")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    # PTX for devices in between and newer ones. A device runs none that is newer than itself.
    codes += [
        f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted({architectures[0], architectures[-1]})
    ]
    # Two architectures at a time beside ninja's files: what a machine of two cores takes. Quotients of floats to two
    # units in the last place, in half as many instructions: each lane computes those of its row.
    arguments["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20", "-prec-div=false", "--threads", "2", *codes]
    return CUDAExtension("sortkd_kernels._C", SOURCES + CUDA_SOURCES, **arguments)


def find_architectures() -> list[int]:
    """What to compile the CUDA kernels for, as compute capabilities times ten; empty for the CPU alone.

    Raises:
        RuntimeError: SORTKD_CUDA asks for a build that is not possible; the message has what is missing.
    """
    if CUDA not in ("", "0", "1", "all"):
        raise RuntimeError(f"expected SORTKD_CUDA to be 0, 1 or all, got {CUDA!r}")
    if CUDA == "0" or SANITIZE:
        return []
    try:
        return _look_for_architectures()
    except LookupError as missing:
        if CUDA:
            raise RuntimeError(f"SORTKD_CUDA={CUDA}: {missing}") from None
        say(f"built without CUDA kernels: {missing}")
        return []


def _look_for_architectures() -> list[int]:
    import torch

    if torch.version.cuda is None:
        raise LookupError(f"torch {torch.__version__} is not a CUDA build")
    listed = re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    try:
        here = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a driver that is too old for this torch, say
        raise LookupError(f"torch cannot use the GPUs that are here ({str(error).splitlines()[0]})") from error
    wanted = [10 * int(major) + int(minor) for major, minor in listed or here]
    if not listed and (CUDA == "all" or (CUDA == "1" and not here)):
        wanted = list(ARCHITECTURES)
    wanted = [arch for arch in wanted if arch >= min(ARCHITECTURES)]
    if not wanted:
        raise LookupError("no GPU of compute capability 8.0 or newer is here; SORTKD_CUDA=all builds them all the same")
    nvcc = _find_nvcc()
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = [int(arch) for arch in re.findall(r"compute_(\d+)", listing.stdout)]
    if not known:
        raise LookupError(
            f"{nvcc} --list-gpu-arch names no architecture: {listing.stderr.strip() or listing.stdout.strip()}"
        )
    # A GPU that is newer than nvcc compiles the PTX of the newest architecture that nvcc knows.
    return sorted({max(arch for arch in known if arch <= each) for each in wanted})


def _find_nvcc() -> Path:
    """The compiler itself: what is on PATH may be a script that calls it. CUDA_HOME is its toolkit from here on."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "")
    if not nvcc.is_file():
        raise LookupError("nvcc is neither on PATH nor in CUDA_HOME")
    if not home:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve() if top else nvcc.resolve().parents[1])
    return nvcc


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
