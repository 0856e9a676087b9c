"""Logits of any layout as rows: three strides in place of a copy, wherever three strides are enough."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Logits seen as ``[outer, C, inner]``; row ``r`` is ``(r // inner, :, r % inner)``.

    Attributes:
        data: the tensor, or a contiguous copy where its strides do not collapse to three.
        outer, inner, classes: the strides, in elements.
    """

    data: Tensor
    outer: int
    inner: int
    classes: int


def inner_size(logits: Tensor) -> int:
    """The rows that interleave their classes: those of the last dimensions whose step is below that of the classes."""
    inner, dim = 1, logits.dim() - 2
    while logits.stride(-1) > 1 and dim >= 0 and logits.stride(dim) < logits.stride(-1):
        inner *= logits.shape[dim]
        dim -= 1
    return inner


def as_rows(logits: Tensor, inner: int) -> Rows:
    """The rows of ``logits`` ``[..., C]``, of which ``inner`` interleave."""
    if logits.numel() == 0:
        return Rows(logits, 0, 0, 1)  # no strides of an empty tensor collapse, and none is used
    size, stride = logits.shape[:-1], logits.stride()[:-1]
    dim, left = len(size), inner
    while left > 1:
        dim -= 1
        left //= size[dim]
    outer_step = _collapsed(size[:dim], stride[:dim], 0)
    inner_step = _collapsed(size[dim:], stride[dim:], 1)
    if outer_step is None or inner_step is None:
        return as_rows(logits.contiguous(), inner)
    return Rows(logits, outer_step, inner_step, logits.stride(-1))


def dense_rows(logits: Tensor, inner: int) -> bool:
    """Whether ``logits`` are ``[outer, C, inner]`` in memory, with no gap."""
    rows, C = as_rows(logits, inner), logits.shape[-1]
    outer = logits.numel() // (C * inner)
    return rows.data is logits and rows.classes == inner and (outer == 1 or rows.outer == C * inner)


def alignment(*steps: int) -> int:
    """The largest power of two, at most 16, that divides every step between rows: what vector loads may rely on."""
    return math.gcd(16, *steps)


def _collapsed(size: tuple[int, ...], stride: tuple[int, ...], default: int) -> int | None:
    """The one stride that walks all of these dimensions in order, or None where there is none."""
    dims = [(n, step) for n, step in zip(size, stride, strict=True) if n != 1]
    for (_, step), (n, finer) in itertools.pairwise(dims):
        if step != n * finer:
            return None
    return dims[-1][1] if dims else default
