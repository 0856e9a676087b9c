"""The Triton backend: the same algorithm as the native kernels, for CUDA and ROCm, and for CPU tensors when interpreted.

    loss.py      the loss and its gradient: shapes, pointers, launches      logits.py   the corrected teacher alone
    tile.py      rows that fit on chip                                      stream.py   rows that do not, and low labels
    rotate.py    the correction in registers                                order.py    the correction by sorting
    sums.py      the sums of a row                                          terms.py    from sums to loss terms
    rows.py      the beginning of a row                                     epilogue.py its end
    dense.py     a top-k teacher's row                                      reduce.py   from rows to scalars
    layout.py    tensors as rows, by strides                                launch.py   every launch choice, with its reason
"""

from __future__ import annotations

from .logits import sort_logits
from .loss import loss_forward, scale_gradient

__all__ = ["loss_forward", "scale_gradient", "sort_logits"]
