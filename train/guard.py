"""The guard against a loss that is not finite: the run stops and tells what was in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sortkd_kernels import SortKDOutput


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message has the facts of the batch."""


class Guard:
    """Keeps the latest step's loss and logits on the device; after a loss that is not finite, that step's for good.

    So nothing waits for the device until `check` reads it, which may be any number of steps later.
    """

    def __init__(self, rows: int, num_classes: int, device: torch.device) -> None:
        self._steps = torch.zeros((), dtype=torch.int64, device=device)  # up to the one that is kept
        self._parts = torch.zeros(3, dtype=torch.float64, device=device)
        self._student, self._teacher = torch.zeros(2, rows, num_classes, device=device)

    def reset(self) -> None:
        """Begin an epoch."""
        self._steps.zero_()
        self._parts.zero_()

    @torch.no_grad()
    def note(self, out: SortKDOutput, student: Tensor, teacher: Tensor | None) -> None:
        """Keep this step's loss and logits, unless a step is kept whose loss was not finite."""
        finite = self._parts[0].isfinite()
        self._steps += finite
        kept = [(self._parts, torch.stack([out.loss, out.kd, out.ce])), (self._student[: len(student)], student)]
        kept += [] if teacher is None else [(self._teacher[: len(student)], teacher)]
        for old, new in kept:
            old.copy_(torch.where(finite, new, old))

    def check(
        self, index: Sequence[Tensor], labels: Tensor, *, teacher: bool, epoch: int, rank: int, lr: float
    ) -> dict[str, float]:
        """The latest step's loss, kd and ce; `NonFiniteLoss` where that or an earlier step's loss was not finite.

        Args:
            index: the images of each step so far, on the host.
            labels: of all images, on the host.
            teacher: whether there is one.
            epoch, rank, lr: what else to tell.
        """
        loss, kd, ce = self._parts.tolist()
        if math.isfinite(loss):
            return {"loss": loss, "kd": kd, "ce": ce}
        step = int(self._steps)
        images = index[step - 1]
        lowest, highest = (x.item() for x in labels[images].aminmax())
        lines = [
            f"expected a finite loss, got {loss} (kd {kd:.6g}, ce {ce:.6g})",
            f"epoch {epoch}, step {step} of it, rank {rank}, lr {lr}",
            _range("student", self._student[: len(images)]),
            *([_range("teacher", self._teacher[: len(images)])] if teacher else []),
            f"labels {lowest} to {highest}, images of the batch: {images[:256].tolist()}",
            "the checkpoints hold the epochs before; start again with a lower SOLVER.LR, or SOLVER.AMP bf16 or none",
        ]
        raise NonFiniteLoss("\n  ".join(lines))


def _range(name: str, x: Tensor) -> str:
    rows = (~x.isfinite()).any(1).nonzero().flatten().tolist()
    good = x[x.isfinite()]
    span = f"{good.min().item():.4g} to {good.max().item():.4g}" if good.numel() else "no finite value"
    return f"{name} {tuple(x.shape)}: {span}; rows that are not finite: {rows[:16] if rows else 'none'}"
