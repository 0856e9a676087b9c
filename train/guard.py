"""The guard against a loss that is not finite: the run stops and tells what was in the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sortkd_kernels import SortKDOutput

from .data import Batch


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message has the facts of the batch."""


class Guard:
    """Checks each step's loss; on a GPU one step late, because waiting for this step's would stall the queue."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None, dict[str, Any]] | None = None

    def check(self, out: SortKDOutput, **facts: Any) -> None:
        """Note this step's loss with what belongs to it, and raise `NonFiniteLoss` if a noted one is not finite."""
        finite = out.loss.detach().isfinite()
        event = None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        previous, self._pending = self._pending, (finite, event, {"out": out, **facts})
        if event is None:
            self.flush()
        else:
            _raise_unless_finite(previous)

    def flush(self) -> None:
        """Check what is still noted; at the end of an epoch, before anything is saved."""
        pending, self._pending = self._pending, None
        _raise_unless_finite(pending)


def _raise_unless_finite(pending: tuple[Tensor, torch.cuda.Event | None, dict[str, Any]] | None) -> None:
    if pending is None:
        return
    finite, event, facts = pending
    if event is not None:
        event.synchronize()
    if not finite.item():
        raise NonFiniteLoss(_describe(**facts))


def _describe(out: SortKDOutput, logits: Tensor, teacher: Tensor | None, batch: Batch, **numbers: Any) -> str:
    lines = [
        f"expected a finite loss, got {out.loss.item()} (kd {out.kd.item():.6g}, ce {out.ce.item():.6g})",
        ", ".join(f"{name} {value}" for name, value in numbers.items()),
        *(_range(name, x) for name, x in (("images", batch.images), ("student", logits), ("teacher", teacher))),
        f"labels {batch.labels.min().item()} to {batch.labels.max().item()}, images of the batch: {_indices(batch)}",
        "the checkpoints hold the epochs before; start again with a lower SOLVER.LR, or with SOLVER.AMP bf16 or none",
    ]
    return "\n  ".join(line for line in lines if line)


def _range(name: str, x: Tensor | None) -> str:
    if x is None:
        return ""
    rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    good = x[x.isfinite()].float()
    span = f"{good.min().item():.4g} to {good.max().item():.4g}" if good.numel() else "no finite value"
    return f"{name} {tuple(x.shape)} {x.dtype}: {span}; rows that are not finite: {rows[:16] if rows else 'none'}"


def _indices(batch: Batch) -> list[int]:
    return batch.index.flatten()[:256].tolist()
