# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The small kernels around the rows: count them, reduce their terms, and rescale a gradient.

Float sums run in a fixed order, so repeated runs agree bit for bit; only the integer count uses atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import rounded


@triton.jit(do_not_specialize=["N", "ignore_index"])
def sort_kd_count(target, count, N, ignore_index, BLOCK: tl.constexpr):
    """Add the rows of one block that count to ``count``."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(target + rows, mask=rows < N, other=0)
    tl.atomic_add(count, tl.sum(((rows < N) & (label != ignore_index)).to(tl.int32), 0), sem="relaxed")


@triton.jit(do_not_specialize=["N", "SPAN"])
def sort_kd_reduce(
    kd, ce, count, kd_sums, ce_sums, loss, N, SPAN, kd_weight: tl.float64, ce_weight: tl.float64,
    CE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum SPAN row terms a program; the LAST stage has one program and weighs, divides and stores the three results."""
    program = tl.program_id(0)
    start = program * SPAN
    kd_sum = tl.zeros([BLOCK], kd.dtype.element_ty)
    ce_sum = tl.zeros([BLOCK], kd.dtype.element_ty)
    for offset in range(0, SPAN, BLOCK):
        rows = start + offset + tl.arange(0, BLOCK)
        inside = (rows < N) & (rows < start + SPAN)
        kd_sum += tl.load(kd + rows, mask=inside, other=0)
        if CE:
            ce_sum += tl.load(ce + rows, mask=inside, other=0)
    kd_total = tl.sum(kd_sum, 0)
    ce_total = tl.sum(ce_sum, 0)
    if LAST:
        if count is not None:
            # No row that counts: 0 / 0, NaN as in F.cross_entropy.
            n = tl.load(count).to(kd.dtype.element_ty)
            kd_total = kd_total / n
            ce_total = ce_total / n
        weight = tl.full([], ce_weight, kd.dtype.element_ty)
        total = tl.full([], kd_weight, kd.dtype.element_ty) * kd_total
        # Asked for as a part only, an infinite cross-entropy leaves the loss alone.
        tl.store(loss, total + tl.where(weight == 0, 0.0, weight * ce_total))
    tl.store(kd_sums + program, kd_total)
    tl.store(ce_sums + program, ce_total)


@triton.jit
def sort_kd_scale(
    grad_student, grad_loss, total, span, INNER, ONE: tl.constexpr, WORK: tl.constexpr, BLOCK: tl.constexpr
):
    """Multiply the gradient ``[outer, C, INNER]`` in place by ONE number or by one number a row; ``span = C * INNER``.

    Programs look at the ONE number before they touch the gradient: 1, the upstream of a plain ``loss.backward()``,
    costs a launch and no traffic, and the host need not know.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    if ONE:
        factor = tl.load(grad_loss).to(WORK)
        if factor != 1:
            g = tl.load(grad_student + index, mask=inside)
            tl.store(grad_student + index, rounded(g.to(WORK) * factor, g.dtype), mask=inside)
    else:
        factor = tl.load(grad_loss + (index // span * INNER + index % INNER), mask=inside, other=0).to(WORK)
        g = tl.load(grad_student + index, mask=inside)
        tl.store(grad_student + index, rounded(g.to(WORK) * factor, g.dtype), mask=inside)
