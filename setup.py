"""Builds `sortkd_kernels._C`; where no C++ compiler works, installs the package without it and says so."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROWS = "csrc/cpu/rows.cpp"
SOURCES = ["csrc/ops.cpp", "csrc/autograd.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/forward.cpp"]
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


def extension_arguments() -> dict[str, object]:
    """The `ext_modules` and `cmdclass` of `setup`, or nothing where torch's build tools are missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        say_missing("torch is not importable in the build environment; use `pip install --no-build-isolation .`")
        return {}

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
                if os.environ.get("SORTKD_REQUIRE_EXTENSION") == "1":
                    raise
                self.extensions = []
                say_missing(f"{type(error).__name__}: {error}".splitlines()[0])

    sanitizer = SANITIZER if SANITIZE else []
    extension = CppExtension(
        "sortkd_kernels._C",
        SOURCES,
        define_macros=[("SORTKD_X86", None)] if X86 else [],
        extra_compile_args={"cxx": [*FLAGS, *OPENMP, *sanitizer]},
        extra_link_args=[*OPENMP, *sanitizer],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildPerCapability}}


def say_missing(reason: str) -> None:
    """The install goes on without the extension; the package then runs on triton or the reference."""
    print(  # noqa: T201 - pip shows it with -v, and always where a build fails
        f"\nsortkd_kernels: the compiled extension was not built ({reason}).\n"
        "The package works without it, on the `triton` or the `reference` backend; for the fast CPU kernels install a "
        "C++20 compiler and install again.\n",
        file=sys.stderr,
    )


setup(**extension_arguments())
