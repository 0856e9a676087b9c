"""The Triton backend: the native kernels' algorithm for CUDA and ROCm, and for CPU tensors under Triton's interpreter.

| file          | concept                                                         |
|---------------|-----------------------------------------------------------------|
| `loss.py`     | the loss and its gradient: shapes, pointers, launches           |
| `logits.py`   | the corrected teacher alone                                     |
| `tile.py`     | rows that fit on chip                                           |
| `stream.py`   | rows that do not, and rows whose label ranks low                |
| `rotate.py`   | the correction in registers, for small ranks                    |
| `order.py`    | the correction by sorting, for all others                       |
| `sums.py`     | the sums of a row                                               |
| `terms.py`    | from sums to loss terms and the coefficients of the gradient    |
| `rows.py`     | the beginning of a row: addresses, label, temperature, weight   |
| `epilogue.py` | the end of a row: weights, gradient                             |
| `dense.py`    | a top-k teacher's row                                           |
| `reduce.py`   | from rows to scalars, and the gradient's rescaling              |
| `layout.py`   | tensors as rows, by strides                                     |
| `launch.py`   | every launch choice, with its reason                            |
| `offline.py`  | the launches compiled, on a machine without a GPU               |
"""

from __future__ import annotations

from .logits import sort_logits
from .loss import loss_forward, scale_gradient

__all__ = ["loss_forward", "scale_gradient", "sort_logits"]
