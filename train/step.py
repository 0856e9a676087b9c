"""One training step and one step of an evaluation, as functions over memory that stays where it is.

The host calls them on a CPU and replays them as CUDA graphs on a GPU (`graphs.py`): they take constants, read what the
loader has put on the device, and leave weights and sums there. Of the numbers that change during a run the learning
rate, the loss scale and CTKD's reversal are read from the device; the size of a batch and DKD's warm-up factor are
constants, for each value of which a step is captured again.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sortkd_kernels import SortKDOutput

from .data import Loader
from .distillers import Loss
from .guard import Guard
from .meter import Meter
from .solver import Solver
from .teacher import FrozenTeacher


class TrainingStep:
    """Images, teacher, student, loss, backward pass, update and sums of one batch.

    `model` is the distiller, or what DDP made of it; `teacher` is None where a cache serves its logits with the images
    or where there is none. A whole batch is computed in `parts`, one after the other, for less memory.
    """

    def __init__(
        self, loader: Loader, model: nn.Module, teacher: FrozenTeacher | None, loss: Loss, solver: Solver,
        meter: Meter, guard: Guard, *, amp: torch.dtype | None, parts: int,
    ) -> None:  # fmt: skip
        self.loader, self.model, self.teacher, self.loss = loader, model, teacher, loss
        self.solver, self.meter, self.guard, self.amp = solver, meter, guard, amp
        self.part_size = -(-loader.plan.batch_size // parts)

    def __call__(self, count: int, share: float, warm_up: float) -> None:
        """The step of the next `count` images, which are `share` of what the other ranks have on average."""
        images, labels, cached = self.loader.read(count)
        if self.teacher is not None:
            teacher = self.teacher.logits(images)
        else:
            teacher = None if cached is None else cached.float()
        self.solver.optimizer.zero_grad(set_to_none=True)
        outs, logits, start = [], [], 0
        for part in images.chunk(-(-count // self.part_size)):
            rows = slice(start, start := start + len(part))
            last = start == count
            # Gradients are averaged over the ranks once a batch.
            alone = not last and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if alone else nullcontext():
                with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
                    student, temperature = self.model(part)
                out = self.loss(student, None if teacher is None else teacher[rows], labels[rows], temperature, warm_up)
                weight = len(part) / count
                self.solver.scaler.scale(out.loss * (share * weight)).backward()
            outs.append((out, weight))
            logits.append(student.detach())
        self.solver.step()
        out, student = _joined(outs), logits[0] if len(logits) == 1 else torch.cat(logits)
        self.meter.update(out, student, labels)
        self.guard.note(out, student, teacher)


class EvaluationStep:
    """Forward pass and sums of one batch of a loader."""

    def __init__(self, loader: Loader, student: nn.Module, meter: Meter, *, amp: torch.dtype | None) -> None:
        self.loader, self.student, self.meter, self.amp = loader, student, meter, amp

    @torch.no_grad()
    def __call__(self, count: int) -> None:
        """The step of the next `count` images."""
        images, labels, _ = self.loader.read(count)
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            logits = self.student(images)
        ce = F.cross_entropy(logits.float(), labels)
        self.meter.update(SortKDOutput(ce, torch.zeros_like(ce), ce, torch.zeros_like(labels)), logits, labels)


def _joined(outs: list[tuple[SortKDOutput, float]]) -> SortKDOutput:
    """The batch's loss and ranks from those of its parts, each with its share of the batch."""
    if len(outs) == 1:
        out, _ = outs[0]
        return out._replace(loss=out.loss.detach())
    loss, kd, ce = (sum(weight * out[i].detach() for out, weight in outs) for i in range(3))
    return SortKDOutput(loss, kd, ce, torch.cat([out.rank for out, _ in outs]))
