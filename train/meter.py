"""Sums over the rows of a pass, kept on the device: reading them is the only synchronisation."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sortkd_kernels import SortKDOutput

from .distributed import World

_NAMES = ("loss", "kd", "ce", "top1", "top5", "corrected", "mean_rank")


class Meter:
    """Row means of the loss and its parts, top-1 and top-5 in percent, the share of corrected rows, the mean rank.

    A row that the teacher gets wrong counts as corrected only where the method `corrects`; its rank counts either way.
    """

    def __init__(self, device: torch.device, *, corrects: bool = True) -> None:
        # float64 counts rows beyond 2^24 exactly.
        self._sums = torch.zeros(len(_NAMES) + 1, dtype=torch.float64, device=device)
        self._factors = (1.0, 1.0, 1.0, 100.0, 100.0, float(corrects), 1.0)

    def reset(self) -> None:
        """Begin a pass."""
        self._sums.zero_()

    @torch.no_grad()
    def update(self, out: SortKDOutput, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
        counts = torch.stack([hits[:, 0], hits.any(-1), out.rank > 0, out.rank]).sum(1)
        self._sums[:3].add_(torch.stack([out.loss, out.kd, out.ce]), alpha=len(labels))
        self._sums[3:7].add_(counts)
        self._sums[7].add_(len(labels))

    def means(self, world: World | None = None) -> dict[str, float]:
        """The means over this rank's rows so far; with `world` over all ranks'."""
        sums = self._sums
        if world is not None and world.size > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        *values, rows = sums.tolist()
        columns = zip(_NAMES, values, self._factors, strict=True)
        return {name: value * factor / max(rows, 1.0) for name, value, factor in columns}
