"""Logits of any layout as rows: three strides in place of a copy, wherever three strides are enough."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
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

    def turned(self) -> Rows:
        """The same rows, all of them inner, where there is no inner dimension."""
        return Rows(self.data, 0, self.outer, self.classes)


def as_rows(logits: Tensor, class_dim: int) -> Rows:
    """The rows of ``logits`` along ``class_dim``."""
    dim = class_dim % logits.dim()
    if logits.numel() == 0:
        return Rows(logits, 0, 0, 1)  # no strides of an empty tensor collapse, and none is used
    size, stride = logits.shape, logits.stride()
    outer = _collapsed(size[:dim], stride[:dim], math.prod(size[dim:]))
    inner = _collapsed(size[dim + 1 :], stride[dim + 1 :], 1)
    if outer is None or inner is None:
        return as_rows(logits.contiguous(), dim)
    return Rows(logits, outer, inner, stride[dim])


def check_labels(argument: str, labels: Tensor, C: int, ignore_index: int | None = None) -> None:
    """On the CPU, which means under the interpreter, what the native CPU kernels say; on a GPU the kernels assert.

    Raises:
        IndexError: a label is outside ``[0, C)`` and is not ``ignore_index``.
    """
    if labels.device.type != "cpu":
        return
    labels = labels.reshape(-1)
    wrong = (labels < 0) | (labels >= C)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        ignored = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise IndexError(
            f"sortkd_kernels: expected {argument} in [0, {C}){ignored}, got {int(labels[row])} in row {row}"
        )


def inner_size(logits: Tensor, class_dim: int) -> int:
    """The number of rows that interleave their classes: the product of the dimensions behind ``class_dim``."""
    return math.prod(logits.shape[class_dim % logits.dim() + 1 :])


def gradient_like(student: Tensor, class_dim: int) -> Tensor:
    """Memory for a gradient: class after class where the student's lie so (channels last), else contiguous."""
    moved = student.movedim(class_dim, -1)
    if moved.is_contiguous():
        return torch.empty_like(moved, memory_format=torch.contiguous_format).movedim(-1, class_dim)
    return torch.empty_like(student, memory_format=torch.contiguous_format)


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
