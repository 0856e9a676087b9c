"""Sums over the rows of an epoch, kept on the device: reading them is the only synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from sortkd_kernels import SortKDOutput

_NAMES = ("loss", "kd", "ce", "top1", "top5", "corrected", "mean_rank")


class Meter(Metric):
    """Row means of the loss and its parts, top-1 and top-5 in percent, the share of corrected rows, the mean rank.

    torchmetrics adds the sums up over the ranks in `compute`; `peek` reads this rank's alone. A row that the teacher
    gets wrong counts as corrected only where the method `corrects`; its rank counts either way.
    """

    full_state_update = False
    totals: Tensor

    def __init__(self, *, corrects: bool = True) -> None:
        super().__init__()
        self.corrects = corrects
        # One vector, so that a step adds and an epoch reduces once; float64 counts rows beyond 2^24 exactly.
        self.add_state("totals", torch.zeros(len(_NAMES) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, out: SortKDOutput, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        rows = labels.numel()
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
        sums = [out.loss * rows, out.kd * rows, out.ce * rows]
        sums += [100 * best[:, 0].sum(), 100 * best.any(-1).sum()]
        sums += [(out.rank > 0).sum() * self.corrects, out.rank.sum(), best.new_tensor(rows, dtype=torch.int64)]
        self.totals += torch.stack([value.double() for value in sums])

    def compute(self) -> dict[str, float]:
        """The means over all ranks."""
        return self.peek()

    def peek(self) -> dict[str, float]:
        """The means over this rank's rows so far."""
        *sums, rows = self.totals.tolist()
        return {name: value / max(rows, 1.0) for name, value in zip(_NAMES, sums, strict=True)}
