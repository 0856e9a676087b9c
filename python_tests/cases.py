"""The one table of what the tests of the op run on: backends, shapes, dtypes, rows and ways to call.

Every result is compared with :mod:`sortkd_kernels.reference` in float64; how far off it may be is in tolerance.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from simt import build
from torch import Tensor

import sortkd_kernels
from sortkd_kernels import ops, reference

IGNORE = -100


class Shape(NamedTuple):
    N: int
    C: int
    why: str

    def __str__(self) -> str:
        return f"{self.N}x{self.C}"


# Every kind of row (see `make_rows`) appears in each shape of at least six rows.
SHAPES = (
    Shape(0, 10, "no rows"),
    Shape(1, 10, "a single row"),
    Shape(6, 1, "one class: KD is 0, no class beside the label"),
    Shape(12, 2, "two classes: NCKD is 0, z-scores are constant"),
    Shape(7, 3, "fewer classes than any vector has lanes"),
    Shape(41, 9, "one past a vector of 8 floats; two full tiles of 16 rows and a rest"),
    Shape(6, 17, "one past a vector of 16 floats"),
    Shape(6, 33, "one past a vector of 32 halves"),
    Shape(64, 100, "CIFAR-100; the tile of 16 rows is full"),
    Shape(6, 129, "one past a power of two"),
    Shape(70, 1000, "ImageNet; more rows than one thread's grain (32768 / C)"),
    Shape(6, 1025, "one past the block of a running sum (64 vectors of 16)"),
    Shape(6, 4099, "beyond 4096: one row a tile, ranks of thousands, three radix passes"),
)
LARGE = Shape(2, 70001, "classes beyond 16 bits, and a row beyond every L1")
FEW_SHAPES = tuple(s for s in SHAPES if str(s) in ("41x9", "6x33", "64x100"))
# Where the arithmetic of a method is its own (no class beside the two), a tile has a rest, a tile is full.
EVERY_VARIANT = ("12x2", "41x9", "64x100")

# Student and teacher. Arithmetic is float64 where either side is, float32 otherwise.
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (
    (F32, F32), (F64, F64), (BF16, BF16), (F16, F16),
    (F32, F16), (F32, BF16),  # a cached half-precision teacher, the common mixture
    (F16, F32), (BF16, F16), (F32, F64), (F64, F32), (F16, F64),
)  # fmt: skip


def dtype_id(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in pair)


def case_id(value: object) -> str:
    """A parameter's part of a test's name."""
    return dtype_id(value) if type(value) is tuple else str(value)


def arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    return F64 if F64 in dtypes else F32


# `native` is always listed: where the extension is missing its tests fail rather than vanish. Triton runs on CPU
# tensors under its interpreter (conftest.py), where triton is installed.
BACKENDS = ("native", "reference")
if "triton" in ops.LOSS and "cpu" in sortkd_kernels.available_backends()["triton"].devices:
    BACKENDS += ("triton",)
# The CUDA kernels on CPU tensors. Where they cannot be built, test_simt.py says why.
if not build.missing():
    BACKENDS += ("simt",)

# The interpreter takes a quarter of a second for such a call. Larger shapes of it are in test_triton.py.
# What depends on the backend alone, not on what is called, is sampled on these and on the reference, which is the formula
# itself: see `calls` and `grid`.
LOGITS_LIMIT = {"triton": 400}


def backend_shapes(shapes: tuple[Shape, ...] = SHAPES) -> list[tuple[str, Shape]]:
    """Each backend with each shape that it is fast enough for."""
    return [(b, s) for b in BACKENDS for s in shapes if LOGITS_LIMIT.get(b, 1 << 30) >= s.N * s.C]


@dataclass(frozen=True)
class Variant:
    """One way to call a loss.

    Attributes:
        options: keyword arguments of the public function.
        decoupled: DKD instead of KD.
        temperature: a float; or a tensor, "scalar" or one value a "row", which asks for its gradient unless "frozen".
    """

    name: str
    options: dict = field(default_factory=dict)
    decoupled: bool = False
    temperature: float | str = 4.0

    def __str__(self) -> str:
        return self.name

    @property
    def function(self):
        return sortkd_kernels.fused_sort_dkd if self.decoupled else sortkd_kernels.fused_sort_kd

    def make_temperature(self, N: int, dtype: torch.dtype = F32) -> float | Tensor:
        if not isinstance(self.temperature, str):
            return self.temperature
        values = torch.tensor(3.3) if "scalar" in self.temperature else torch.linspace(1, 6, N)
        return values.to(dtype).requires_grad_("frozen" not in self.temperature)


VARIANTS = (
    Variant("sort"),
    Variant("swap", {"correction": "swap"}),
    Variant("plain-kd", {"correction": "none"}),
    Variant("sum", {"reduction": "sum"}),
    Variant("rows", {"reduction": "none"}),
    Variant("batchmean", {"reduction": "batchmean", "ce_weight": 0.1, "kd_weight": 0.9}),
    # exp(s) is a power of exp(s / T) at 1, 2 and 4, and needs its own exponential elsewhere.
    Variant("T1-ce", {"ce_weight": 0.5, "kd_weight": 0.5}, temperature=1.0),
    Variant("T2-ce", {"ce_weight": 0.5, "kd_weight": 0.5}, temperature=2.0),
    Variant("T4-ce", {"ce_weight": 0.1, "kd_weight": 0.9}),
    Variant("T2.5-ce", {"ce_weight": 0.1, "kd_weight": 0.9}, temperature=2.5),
    Variant("T4-ce-rows", {"ce_weight": 0.7, "reduction": "none"}),
    Variant("ce-alone", {"ce_weight": 1.0, "kd_weight": 0.0}),
    Variant("scalar-T", temperature="scalar"),
    Variant("scalar-T-ce", {"ce_weight": 0.1, "kd_weight": 0.9, "reduction": "sum"}, temperature="scalar"),
    Variant("row-T", temperature="row"),
    Variant("row-T-swap-rows", {"correction": "swap", "reduction": "none"}, temperature="row"),
    Variant("frozen-row-T-ce", {"ce_weight": 0.3}, temperature="frozen row"),
    Variant("lskd", {"standardize": True, "ce_weight": 0.1, "kd_weight": 9.0}, temperature=2.0),
    Variant("lskd-rows", {"standardize": True, "correction": "swap", "reduction": "none"}, temperature=3.0),
    Variant("lskd-row-T", {"standardize": True}, temperature="row"),
    Variant("dkd", {"ce_weight": 1.0}, decoupled=True),
    Variant("dkd-swap-rows", {"correction": "swap", "reduction": "none", "alpha": 2.0, "beta": 0.5}, decoupled=True),
    Variant("dkd-T1-warmup", {"kd_weight": 0.3, "beta": 2.0, "ce_weight": 1.0}, decoupled=True, temperature=1.0),
    Variant("dkd-no-target-term", {"alpha": 0.0, "beta": 1.0}, decoupled=True),
    Variant("dkd-scalar-T", decoupled=True, temperature="scalar"),
    Variant("dkd-row-T", {"reduction": "sum", "ce_weight": 0.2}, decoupled=True, temperature="row"),
    Variant("dkd-lskd", {"standardize": True, "alpha": 9.0, "beta": 72.0}, decoupled=True, temperature=2.0),
    Variant("dkd-lskd-scalar-T", {"standardize": True}, decoupled=True, temperature="scalar"),
)
BY_NAME = {v.name: v for v in VARIANTS}
FEW_VARIANTS = tuple(
    BY_NAME[n] for n in ("sort", "T4-ce-rows", "scalar-T-ce", "row-T", "lskd", "dkd", "dkd-lskd-scalar-T")
)


# Two calls that between them use everything.
TWO_VARIANTS = tuple(BY_NAME[n] for n in ("T4-ce-rows", "dkd-lskd-scalar-T"))
KERNELS = tuple(b for b in BACKENDS if b not in LOGITS_LIMIT and b != "reference")


def calls(variants: tuple[Variant, ...] | list[Variant]) -> list[tuple[str, Variant]]:
    """The kernels with each variant, the other backends with two of them."""
    two = [v for v in variants if v in TWO_VARIANTS] or variants[:1]
    return [(b, v) for b in BACKENDS for v in (variants if b in KERNELS else two)]


def grid() -> list[tuple[str, Shape, Variant]]:
    """Backends, shapes and variants: every shape, every variant, and both crossed where they interact."""

    def variants(backend: str, shape: Shape) -> tuple[Variant, ...]:
        if backend in KERNELS:
            return VARIANTS if str(shape) in EVERY_VARIANT else FEW_VARIANTS
        return VARIANTS if str(shape) == "12x2" else TWO_VARIANTS

    return [(b, s, v) for b, s in backend_shapes() for v in variants(b, s)]


def dtype_grid() -> list[tuple[str, tuple[torch.dtype, torch.dtype], Shape, Variant]]:
    """Backends and pairs of dtypes. No arithmetic depends on the pair, only how values are read and rounded, so that two
    calls and a third in turn serve each; float16, whose gradient is made in the backward pass, has a few more."""
    found = []
    for backend in BACKENDS:
        shapes = FEW_SHAPES if backend in KERNELS else FEW_SHAPES[:1]
        for i, pair in enumerate(DTYPES):
            names = {v.name: v for v in (*TWO_VARIANTS, VARIANTS[(5 * i + 3) % len(VARIANTS)])}
            names |= {v.name: v for v in FEW_VARIANTS if pair == (F16, F16)}
            variants = tuple(names.values()) if backend in KERNELS else TWO_VARIANTS
            found += [(backend, pair, shapes[(i + j) % len(shapes)], v) for j, v in enumerate(variants)]
            found += [(backend, pair, s, TWO_VARIANTS[0]) for s in shapes if s != shapes[i % len(shapes)]]
    return found


class Rows(NamedTuple):
    student: Tensor
    teacher: Tensor
    target: Tensor


def make_rows(N: int, C: int, dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32), seed: int = 0) -> Rows:
    """Random logits whose rows cycle through the kinds of teacher: right, wrong by a few classes, random, label last,
    full of ties (also with the label), and a row to ignore."""
    generator = torch.Generator().manual_seed(seed * 7919 + N * 131 + C)
    student = torch.randn(N, C, generator=generator, dtype=F64) * 3
    teacher = torch.randn(N, C, generator=generator, dtype=F64) * 3
    target = torch.randint(C, (N,), generator=generator)
    for n in range(N):
        row, label = teacher[n], int(target[n])
        if n % 6 == 0:
            row[label] = row.max() + 1
        elif n % 6 == 1:
            row[label] = row.sort(descending=True).values[min(3, C - 1)] - 1e-2
        elif n % 6 == 3:
            row[label] = row.min() - 1
        elif n % 6 == 4:
            row.mul_(2).round_().div_(2)
        elif n % 6 == 5:
            target[n] = IGNORE
    return Rows(student.to(dtypes[0]), teacher.to(dtypes[1]), target)


class Result(NamedTuple):
    loss: Tensor
    kd: Tensor
    ce: Tensor
    rank: Tensor
    grad: Tensor
    grad_temperature: Tensor | None
    truncates: bool = False  # Triton's interpreter cuts off what the hardware rounds to bfloat16, and 0 is 2^-126


def grad_output_of(loss: Tensor) -> Tensor:
    """What the loss is multiplied by: 1 for a scalar, different values for rows."""
    return torch.ones_like(loss) if loss.dim() == 0 else torch.linspace(0.5, 2, loss.numel()).to(loss).view_as(loss)


def gradient_of(temperature: float | Tensor) -> Tensor | None:
    return temperature.grad if isinstance(temperature, Tensor) else None


def run(rows: Rows, variant: Variant, backend: str | None, wrap=lambda function: function) -> Result:
    """Forward and backward through the public function, ``wrap``ped for instance by torch.compile."""
    student = rows.student.clone().requires_grad_()
    temperature = variant.make_temperature(len(rows.target), arithmetic(rows.student.dtype, rows.teacher.dtype))

    def call(student, teacher, target, temperature):
        return variant.function(
            student, teacher, target, temperature=temperature, backend=backend, return_parts=True, **variant.options
        )

    out = wrap(call)(student, rows.teacher, rows.target, temperature)
    out.loss.backward(grad_output_of(out.loss))
    truncates = backend == "triton" and student.dtype == BF16
    return Result(*(t.detach() for t in out[:4]), student.grad, gradient_of(temperature), truncates)


def truth(rows: Rows, variant: Variant, dtype: torch.dtype = F64) -> Result:
    """The same by the formula of `reference.loss_rows` and PyTorch's autograd, in ``dtype``."""
    student = rows.student.to(dtype, copy=True).requires_grad_()
    temperature = variant.make_temperature(len(rows.target), dtype)
    kd_rows, ce_rows, rank = reference.loss_rows(
        student,
        # As good as -inf, and d(t / T)/dT is then 0 and not 0 * inf.
        rows.teacher.to(dtype).clamp_min(torch.finfo(dtype).min / 2),
        rows.target,
        temperature=temperature,
        correction=variant.options.get("correction", "sort"),
        alpha=variant.options.get("alpha", 1.0),
        beta=variant.options.get("beta", 8.0) if variant.decoupled else None,
        standardized=variant.options.get("standardize", False),
    )
    reduction = variant.options.get("reduction", "mean")
    count = (rows.target != IGNORE).sum() if "mean" in reduction else 1
    kd, ce = (x if reduction == "none" else x.sum() / count for x in (kd_rows, ce_rows))
    loss = variant.options.get("kd_weight", 1.0) * kd + variant.options.get("ce_weight", 0.0) * ce
    loss.backward(grad_output_of(loss))
    return Result(*(t.detach() for t in (loss, kd, ce, rank)), student.grad, gradient_of(temperature))
