"""The Triton backend's launches compiled on a machine without a GPU, for what the compiled form shows.

They are recorded, on tensors that nobody touches, and compiled as the JIT would compile them, so Triton must not
interpret in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from sortkd_kernels.backends.triton import choices, loss_forward, scale_gradient, sort_logits
from sortkd_kernels.ops import LossConfig

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
          torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}  # fmt: skip


class Case(NamedTuple):
    """A training step's calls, KD with the sort correction unless ``options`` of a `LossConfig` say otherwise.

    Of ``neighbours`` the rows lie next to each other, as in ``[N, C, H, W]``.
    """

    C: int
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()
    neighbours: bool = False


class Recorded(NamedTuple):
    """A launch and what it was called with."""

    launch: choices.Launch
    pointers: tuple[Tensor, ...]
    numbers: tuple

    @property
    def kernel(self) -> Any:
        return self.launch.kernel

    def source(self) -> ASTSource:
        """Signature, constants and alignments, as the JIT derives them."""
        parameters = self.kernel.params[: len(self.pointers) + len(self.numbers)]
        types = ["*" + _TYPES[x.dtype] for x in self.pointers]
        types += [p.annotation_type for p in parameters[len(types) :]]
        signature = {p.name: kind for p, kind in zip(parameters, types, strict=True)}
        aligned = [
            i for i, (p, x) in enumerate(zip(parameters, self.pointers, strict=False))
            if not p.do_not_specialize and x.data_ptr() % 16 == 0
        ]  # fmt: skip
        return ASTSource(
            self.kernel, signature | dict.fromkeys(self.launch.constants, "constexpr"), self.launch.constants,
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )  # fmt: skip


def record(call: Callable[[], Any]) -> list[Recorded]:
    """The launches of a call of the backend on CPU tensors, in order."""
    found: list[Recorded] = []
    saved = choices.Launch.__call__, choices._processors
    caches = choices.plan, choices.logits_plan, choices.scale, choices.bucket
    try:
        choices.Launch.__call__ = lambda self, pointers, numbers: found.append(Recorded(self, pointers, numbers))
        choices._processors = lambda _device: 132
        for cache in caches:
            cache.cache_clear()
        call()
    finally:
        choices.Launch.__call__, choices._processors = saved
        for cache in caches:
            cache.cache_clear()
    return found


def launches(case: Case, target: str, rows: int = 64) -> list[Recorded]:
    """The launches of a case for one target: the loss with its gradient, the rescaling, the correction alone."""
    logits = torch.empty(rows, case.C, dtype=case.dtype)
    if case.neighbours:
        logits = torch.empty(case.C, rows, dtype=case.dtype).t()
    labels = torch.zeros(rows, dtype=torch.int64)

    def step() -> None:
        config = LossConfig(**dict(case.options))
        gradient = loss_forward(logits, logits, None, labels, None, config, None, True, False)[4]
        scale_gradient(gradient, torch.ones(()))
        sort_logits(logits, labels, 1, -100)

    found = record(step)
    if TARGETS[target].backend == "hip":
        for recorded in found:
            recorded.launch.options.pop("maxnreg", None)
    return found


def compiled(recorded: Recorded, target: str) -> CompiledKernel:
    """A launch compiled for one target."""
    return compile_kernel(recorded.source(), target=TARGETS[target], options=recorded.launch.options)
