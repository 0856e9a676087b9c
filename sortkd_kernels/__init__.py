"""Sort-KD (arXiv 2508.16544) as one fused kernel: the teacher corrected by the label, the loss and its gradient."""

from .backends import BackendState, available_backends, build_info
from .fused_linear import fused_linear_sort_kd
from .fused_sort_kd import (
    SortKDOutput,
    SortKDTopKOutput,
    fused_sort_dkd,
    fused_sort_kd,
    fused_sort_kd_topk,
    sort_logits,
)
from .losses import FusedLinearSortKDLoss, LearnedTemperature, SortDKDLoss, SortKDLoss

__all__ = [
    "BackendState",
    "FusedLinearSortKDLoss",
    "LearnedTemperature",
    "SortDKDLoss",
    "SortKDLoss",
    "SortKDOutput",
    "SortKDTopKOutput",
    "available_backends",
    "build_info",
    "fused_linear_sort_kd",
    "fused_sort_dkd",
    "fused_sort_kd",
    "fused_sort_kd_topk",
    "sort_logits",
]
__version__ = "0.1.0"
