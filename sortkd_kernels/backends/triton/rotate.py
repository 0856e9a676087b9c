# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The correction of a teacher's row in registers, where few classes stand above the label.

The corrected row is the row with its top ``rank + 1`` values rotated by one (`reference.py` has the proof). Walking
down the order (value descending, index ascending) needs one reduction a step, and for the ranks of a trained teacher
that is a handful; `order.py` has the method for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import INFINITY


@triton.jit
def correct_in_registers(t, classes, rank, t_y, CORRECTION: tl.constexpr, LIMIT: tl.constexpr):
    """The corrected tile ``[R, B]`` without its labels, which are at -inf, and each label's new value.

    Rows of rank over LIMIT come back wrong: they are somebody else's. A swap has one step whatever the rank.
    """
    top = t_y
    above = t > t_y[:, None]
    if CORRECTION == 1:
        steps = tl.max(tl.where(rank <= LIMIT, rank, 0), 0)
        left = above
        holder = tl.full(rank.shape, -1, tl.int32)
        for _ in range(steps):
            # Exhausted rows of the tile see -inf, which is above no label, and stand still.
            value, index = tl.max(tl.where(left, t, -INFINITY), 1, return_indices=True)
            more = value > t_y
            # Not a bare maximum: a label that is NaN must stay NaN while other rows of the tile take their steps.
            top = tl.where(more, tl.maximum(top, value), top)
            t = tl.where(more[:, None] & (classes == holder[:, None]), value[:, None], t)
            holder = tl.where(more, index, holder)
            left = left & (classes != holder[:, None])
        t = tl.where(classes == holder[:, None], t_y[:, None], t)
    if CORRECTION == 2:
        value, index = tl.max(tl.where(above, t, -INFINITY), 1, return_indices=True)
        top = tl.where(rank > 0, value, t_y)
        t = tl.where((rank > 0)[:, None] & (classes == index[:, None]), t_y[:, None], t)
    return t, top
