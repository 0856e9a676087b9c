"""The Triton backend: CUDA, ROCm, and CPU tensors under Triton's interpreter.

| file            | concept                                                                        |
|-----------------|--------------------------------------------------------------------------------|
| `launch.py`     | the three functions: memory and launches                                       |
| `choices.py`    | logits of any layout as rows, and what is launched for them, with the reasons  |
| `short_rows.py` | the loss of rows that fit in registers                                         |
| `long_rows.py`  | of rows that do not, and of those whose label ranks low                        |
| `bucket.py`     | of a top-k teacher whose absent classes are one                                |
| `logits.py`     | the corrected teacher alone                                                    |
| `order.py`      | the classes above a label, sorted                                              |
| `row_math.py`   | a row's sums, loss terms and gradient                                          |
| `row_io.py`     | a row's place in memory, its label, the sum of all rows' terms                 |
"""

from __future__ import annotations

from .launch import loss_forward, scale_gradient, sort_logits

__all__ = ["loss_forward", "scale_gradient", "sort_logits"]
