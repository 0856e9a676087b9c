# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""What every row kernel does first: find a row in memory, and read its label, temperature and weight.

Row ``r`` of logits ``[outer, C, inner]`` is ``(r // INNER, :, r % INNER)``, which is the order of the flattened target;
a plain ``[N, C]`` has ``INNER = 1``. Offsets are 64-bit: ``N * C`` passes 2**31 at 16384 x 131072.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def aligned(x, ALIGN: tl.constexpr):
    """``x`` itself, which the host knows to be a multiple of ALIGN.

    Triton only infers multiples of 16 from an argument. C = 1000 would lose its 128-bit loads; the product gives the
    compiler's divisibility analysis what the host knows.
    """
    return x // ALIGN * ALIGN


@triton.jit
def row_offset(outer, inner, stride_outer, stride_inner, ALIGN: tl.constexpr):
    """Where each row starts, in elements."""
    return outer.to(tl.int64) * aligned(stride_outer, ALIGN) + inner.to(tl.int64) * stride_inner


@triton.jit
def class_offset(classes, stride_class):
    """Where each class of a row lies, from the row's start."""
    return classes.to(tl.int64) * stride_class


@triton.jit
def read_label(target, rows, inside, ignore_index, C):
    """The label of each row, 0 where there is none, and whether the row counts."""
    label = tl.load(target + rows, mask=inside, other=0)
    counts = inside & (label != ignore_index)
    known = (label >= 0) & (label < C)
    # What F.cross_entropy does on a GPU. A build without assertions reads no memory for such a row either.
    tl.device_assert(known | (counts == 0), "sortkd_kernels: a label is outside [0, C) and is not ignore_index")
    counts = counts & known
    return tl.where(counts, label, 0).to(tl.int32), counts


@triton.jit
def read_temperature(temperatures, stride, temperature, rows, counts, WORK: tl.constexpr):
    """The temperature of each row: a tensor's, one for all (stride 0) or one a row, or else the number."""
    if temperatures is None:
        return tl.full(rows.shape, temperature, WORK)
    else:
        return tl.load(temperatures + rows * stride, mask=counts, other=1).to(WORK)


@triton.jit
def read_factor(grad_loss, stride, count, rows, counts, WORK: tl.constexpr):
    """What multiplies a row's gradient: the upstream gradient, the mean's 1/n, and 0 where the row does not count."""
    factor = tl.full(rows.shape, 1.0, WORK)
    if grad_loss is not None:
        factor = tl.load(grad_loss + rows * stride, mask=counts, other=0).to(WORK)
    if count is not None:
        factor = factor / tl.load(count).to(WORK)
    return tl.where(counts, factor, 0.0)


@triton.jit
def leave(rows, left, listed, tally):
    """Append the rows of a program that are ``left`` to the list of those that a later launch takes, in any order."""
    n = tl.sum(left.to(tl.int32), 0)
    if n > 0:
        place = tl.atomic_add(tally, n, sem="relaxed") + tl.cumsum(left.to(tl.int32), 0) - 1
        tl.store(listed + place, rows, mask=left)


@triton.jit
def value_at(row, label, stride_class, known, WORK: tl.constexpr):
    """Each row's logit of its label, 0 where the row does not count; ``row`` is ``[R, 1]``."""
    at = row + class_offset(label[:, None], stride_class)
    return tl.sum(tl.load(at, mask=known[:, None], other=0).to(WORK), 1)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in another float dtype, rounded to nearest as the hardware does."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter would truncate. After this the value is a bfloat16's already.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
