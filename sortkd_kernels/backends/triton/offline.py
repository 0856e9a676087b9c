"""What the compiler makes of the launches, on a machine without a GPU: registers, spills, vector loads.

    TRITON_INTERPRET=0 python -m sortkd_kernels.backends.triton.offline

prints one JSON line for each kernel of :data:`CASES` and each of its targets. The launches of the public functions are
recorded, on tensors that nobody touches, and compiled as the JIT would compile them. None of it is a timing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from . import launch
from .logits import sort_logits
from .loss import loss_forward, scale_gradient

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALL = tuple(TARGETS)
TILE, STREAM = "sort_kd_tile", "sort_kd_stream"
_KINDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
          torch.int32: "i32", torch.int64: "i64"}  # fmt: skip


class Case(NamedTuple):
    """A call: its size, the kernels of it to compile (the first launch of each), for which targets.

    Attributes:
        every_sum: DKD, z-score and a temperature a row with its gradient, in place of KD.
        top_k: the classes that the teacher comes with, or 0 for all.
        dense: whether the classes are the second of four dimensions.
    """

    C: int
    dtype: torch.dtype
    targets: tuple[str, ...]
    kernels: tuple[str, ...]
    every_sum: bool = False
    top_k: int = 0
    dense: bool = False


CASES = (
    Case(1000, torch.float32, ALL, (TILE,)),  # the common case
    Case(1000, torch.bfloat16, ALL, (TILE,)),
    Case(1000, torch.float32, ("sm_90", "gfx942"), ("sort_kd_count", "sort_kd_reduce", "sort_kd_scale")),
    Case(1000, torch.float16, ("sm_90",), (STREAM, "sort_kd_logits")),  # what a tile leaves: one sorted run
    Case(16384, torch.bfloat16, ALL, (TILE,)),  # the largest row on chip
    Case(16384, torch.float32, ALL, (TILE,)),
    Case(16384, torch.float32, ("sm_90", "gfx942"), (STREAM,)),  # what it leaves: runs to merge
    Case(8192, torch.float32, ("sm_90",), (TILE,), every_sum=True),  # the largest row on chip with all sums
    Case(4096, torch.float64, ("sm_90",), (TILE,)),
    Case(150, torch.bfloat16, ("sm_90",), (TILE,), dense=True),  # segmentation, an odd number of pixels
    Case(32000, torch.bfloat16, ("sm_80", "sm_100"), (STREAM,)),  # a vocabulary
    Case(32000, torch.float32, ("sm_90",), (STREAM,), every_sum=True, top_k=64),
)


def compiled(case: Case, target: str) -> list[dict[str, Any]]:
    """The facts of each kernel of a case for one target."""
    calls = _calls(case, hip=TARGETS[target].backend == "hip")
    facts = []
    for name in case.kernels:
        kernel, args, keywords = next(call for call in calls if call[0].__name__ == name)
        source, options = _specialised(kernel, args, keywords)
        binary = triton.compile(source, target=TARGETS[target], options=options)
        about = {"kernel": name, "target": target, "C": case.C, "bytes": case.dtype.itemsize, "dense": case.dense}
        block = {"warps": options["num_warps"], "classes": source.constants.get((kernel.arg_names.index("B"),), 0)
                 if "B" in kernel.arg_names else 0}  # fmt: skip
        facts.append({**about, **block, **_machine_code(binary)})
    return facts


def _calls(case: Case, hip: bool) -> list[tuple[JITFunction, tuple, dict[str, Any]]]:
    """The launches of one loss, one rescaling and one correction."""
    calls = []
    saved = JITFunction.run, launch._processors, torch.version.hip
    try:
        JITFunction.run = lambda self, *args, grid, warmup, **keywords: calls.append((self, args, keywords))
        launch._processors = lambda _: 132
        torch.version.hip = "offline" if hip else None
        student = torch.empty((2, case.C, 33, 33) if case.dense else (4, case.C), dtype=case.dtype)
        labels = torch.zeros((2, 33, 33) if case.dense else 4, dtype=torch.int64)
        indices = torch.zeros(4, case.top_k, dtype=torch.int64) if case.top_k else None
        gradient = loss_forward(
            student, student[:, : case.top_k] if case.top_k else student, indices, labels,
            torch.ones(4) if case.every_sum else None, 4.0, 1, case.every_sum, 0.9, 1.0, 8.0, 0.1, case.every_sum, True,
            1, 2, -100, True, None, True,
        )[4]  # fmt: skip
        scale_gradient(gradient, torch.ones(()), 1)
        sort_logits(student.movedim(1, -1), labels, 1, -100)
    finally:
        JITFunction.run, launch._processors, torch.version.hip = saved
    return calls


def _specialised(kernel: JITFunction, args: tuple, keywords: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """A call's signature, constants and alignments, as the JIT derives them, and its compile options."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {"num_warps": 4}
    for name, value in keywords.items():
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
    return ASTSource(kernel, signature, constants, attributes), options


def _machine_code(binary: CompiledKernel) -> dict[str, Any]:
    """Registers, spilled bytes, and for NVIDIA the 128-bit loads and stores and whether labels are asserted."""
    if "amdgcn" in binary.asm:
        asm = binary.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{x}:\s+(\d+)", asm)[1]) for x in ("count", "spill_count"))
        return {"registers": registers, "spilled": 4 * spilled}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {
        "registers": int(registers),
        "spilled": int(stack),
        "loads": text.count(" LDG.E.128"),
        "stores": text.count(" STG.E.128"),
        "asserts": "__assertfail" in binary.asm["ptx"],
    }


if __name__ == "__main__":
    for case in CASES:
        for target in case.targets:
            for facts in compiled(case, target):
                sys.stdout.write(json.dumps(facts) + "\n")
                sys.stdout.flush()
