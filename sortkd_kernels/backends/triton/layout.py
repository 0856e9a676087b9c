"""Logits of any layout as rows: three strides in place of a copy, wherever three strides are enough."""

from __future__ import annotations

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


def as_rows(logits: Tensor, class_dim: int) -> Rows:
    """The rows of ``logits`` along ``class_dim``."""
    dim = class_dim % logits.dim()
    size, stride = logits.shape, logits.stride()
    outer = _collapsed(size[:dim], stride[:dim], math.prod(size[dim:]))
    inner = _collapsed(size[dim + 1 :], stride[dim + 1 :], 1)
    if outer is None or inner is None:
        return as_rows(logits.contiguous(), dim)
    return Rows(logits, outer, inner, stride[dim])


def check_labels(target: Tensor, C: int, ignore_index: int) -> None:
    """On the CPU, which means under the interpreter, what the CPU kernels say; on a GPU the kernels assert.

    Raises:
        IndexError: a label is outside ``[0, C)`` and is not ``ignore_index``.
    """
    if target.device.type != "cpu":
        return
    rows = target.reshape(-1)
    bad = ((rows != ignore_index) & ((rows < 0) | (rows >= C))).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise IndexError(f"sortkd_kernels: expected target in [0, {C}) or {ignore_index}, got {int(rows[row])} in row {row}")


def inner_size(logits: Tensor, class_dim: int) -> int:
    """The number of rows that interleave their classes: the product of the dimensions behind ``class_dim``."""
    return math.prod(logits.shape[class_dim % logits.dim() + 1 :])


def alignment(*steps: int) -> int:
    """The largest power of two, at most 16, that divides every step between rows: what vector loads may rely on."""
    return math.gcd(16, *steps)


def _collapsed(size: tuple[int, ...], stride: tuple[int, ...], default: int) -> int | None:
    """The one stride that walks all of these dimensions in order, or None where there is none."""
    dims = [(n, step) for n, step in zip(size, stride, strict=True) if n != 1]
    for (_, step), (n, finer) in zip(dims, dims[1:], strict=False):
        if step != n * finer:
            return None
    return dims[-1][1] if dims else default
