"""The launches of the public functions, compiled on a machine without a GPU.

They are recorded, on tensors that nobody touches, and compiled as the JIT would compile them. What the compiled form
shows is for `benchmarks/gpu_static.py` to read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from . import launch
from .logits import sort_logits
from .loss import loss_forward, scale_gradient

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_KINDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
          torch.int32: "i32", torch.int64: "i64"}  # fmt: skip


class Case(NamedTuple):
    """A training step's calls: one loss with its gradient, one rescaling and one correction alone.

    Attributes:
        C: the number of classes.
        dtype, teacher: of the student, and of the teacher where it differs.
        every_sum: DKD, z-score and a temperature a row with its gradient, in place of KD.
        temperature: 1, 2 and 4 save an exponential.
        correction: 0 none, 1 sort, 2 swap.
        top_k: the classes that the teacher comes with, or 0 for all.
        dense: whether the classes are the second of four dimensions.
    """

    C: int
    dtype: torch.dtype = torch.float32
    teacher: torch.dtype | None = None
    every_sum: bool = False
    temperature: float = 4.0
    correction: int = 1
    top_k: int = 0
    dense: bool = False


class Launch(NamedTuple):
    """A recorded launch.

    Attributes:
        kernel: the kernel.
        args, keywords: what it was called with.
        programs: the size of the grid.
    """

    kernel: JITFunction
    args: tuple
    keywords: dict[str, Any]
    programs: int

    @property
    def left(self) -> bool:
        """Whether it takes the rows that another launch has left."""
        return bool(self.keywords.get("LEFT"))

    @property
    def num_warps(self) -> int:
        return self.keywords.get("num_warps", 4)

    @property
    def rows(self) -> int:
        """Rows that a program holds at a time."""
        return self.keywords.get("R", 1)


def launches(case: Case, target: str, Options: type, rows: int = 4) -> list[Launch]:
    """The launches of a case on ``rows`` rows (4 or more), in order."""
    found = []
    saved = JITFunction.run, launch._processors, torch.version.hip
    try:
        JITFunction.run = lambda self, *args, grid, warmup, **keywords: found.append(
            Launch(self, args, keywords, grid[0])
        )
        launch._processors = lambda _: 132
        torch.version.hip = "offline" if TARGETS[target].backend == "hip" else None
        student = torch.empty((rows // 2, case.C, 33, 33) if case.dense else (rows, case.C), dtype=case.dtype)
        teacher = torch.empty(student.shape, dtype=case.teacher or case.dtype)
        labels = torch.zeros((rows // 2, 33, 33) if case.dense else rows, dtype=torch.int64)
        indices = torch.zeros(rows, case.top_k, dtype=torch.int64) if case.top_k else None
        temperature = torch.ones(rows) if case.every_sum and not case.dense else None
        config = Options(
            case.temperature, case.correction, 0.9, 1.0, 8.0 if case.every_sum else None, 0.1,
            case.every_sum and not case.top_k, True, 2, -100, True,
        )  # fmt: skip
        gradient = loss_forward(
            student.movedim(1, -1),
            teacher[:, : case.top_k] if case.top_k else teacher.movedim(1, -1),
            indices,
            labels,
            temperature,
            config,
            None,
            True,
            temperature is not None,
        )[4]
        scale_gradient(gradient, torch.ones(()))
        sort_logits(teacher.movedim(1, -1), labels, case.correction, -100)
    finally:
        JITFunction.run, launch._processors, torch.version.hip = saved
    return found


def compiled(recorded: Launch, target: str) -> CompiledKernel:
    """A launch compiled for one target: its signature, constants and alignments as the JIT derives them."""
    kernel = recorded.kernel
    values = dict(zip(kernel.arg_names, recorded.args, strict=False))
    options = {"num_warps": recorded.num_warps}
    for name, value in recorded.keywords.items():
        (values if name in kernel.arg_names else options)[name] = value
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        general = parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = "*" + _KINDS[value.dtype]
        elif parameter.is_constexpr or value is None or (value == 1 and not general and not parameter.annotation_type):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = parameter.annotation_type or "i32"
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0 and not general):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_kernel(source, target=TARGETS[target], options=options)
