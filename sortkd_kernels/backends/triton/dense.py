# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""A top-k teacher's row, written out in a program's scratch memory: from there on it is a row like any other.

The label may lie outside the k classes, and it may rank anywhere among values that nobody promised to be the largest
(servers append the label's own). On the full row the correction needs no special case for either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import INFINITY


@triton.jit
def densify(
    values, indices, stride, K, row, C, live, UNIFORM: tl.constexpr, WORK: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Fill ``row[:C]`` with the tail and the K values at their classes; ``live`` is C, or 0 for a row that is not read.

    The tail is -inf, or for UNIFORM, where the values are log-probabilities, an equal share of what they leave of 1.
    """
    tail = tl.full([], -INFINITY, WORK)
    listed = tl.minimum(live, K)
    if UNIFORM:
        mass = tl.zeros([], WORK)
        for start in range(0, listed, B):
            k = start + tl.arange(0, B)[None, :]
            value = tl.load(values + k * stride, mask=k < listed, other=-INFINITY).to(WORK)
            mass += tl.sum(tl.sum(tl.exp(value), 1), 0)
        # Rounding may carry the mass past 1. With K = C nobody takes the tail.
        tail = tl.log(tl.maximum(1.0 - mass, 0.0) / tl.maximum(C - K, 1).to(WORK))
    for start in range(0, live, B):
        classes = start + tl.arange(0, B)[None, :]
        tl.store(row + classes, tl.zeros([1, B], WORK) + tail, mask=classes < live)
    tl.debug_barrier()
    for start in range(0, listed, B):
        k = start + tl.arange(0, B)[None, :]
        inside = k < listed
        value = tl.load(values + k * stride, mask=inside, other=0).to(WORK)
        index = tl.load(indices + k * stride, mask=inside, other=0)
        known = (index >= 0) & (index < C)
        tl.device_assert(known | (inside == 0), "sortkd_kernels: a teacher index is outside [0, C)")
        tl.store(row + index, value, mask=inside & known)
    tl.debug_barrier()
