"""The training loop: epochs, steps, evaluation, and the state that a resumed run starts from."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sortkd_kernels import SortKDOutput

from .data import Batch, Loader, Loaders
from .distillers import Distiller, build_loss
from .distributed import World, same_buffers, wrap
from .guard import Guard
from .logs import Progress, Row, RunLog
from .meter import Meter
from .schema import Config
from .teacher import Teacher

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A student in training; `history` holds a row of numbers for each finished epoch."""

    def __init__(
        self, config: Config, loaders: Loaders, distiller: Distiller, teacher: Teacher | None, world: World
    ) -> None:
        self.config, self.loaders, self.teacher, self.world = config, loaders, teacher, world
        solver = config.SOLVER
        self.distiller = distiller.to(world.device, memory_format=torch.channels_last)
        self.model = wrap(self.distiller, world)
        self.loss = build_loss(config)
        self.optimizer = torch.optim.SGD(
            self.distiller.parameters(), solver.LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, solver.LR_DECAY_STAGES, solver.LR_DECAY_RATE
        )
        self.amp = AMP_DTYPES[solver.AMP]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp is torch.float16)
        self.guard = Guard()
        self.history: list[Row] = []

    @property
    def best(self) -> Row:
        """The epoch with the highest test accuracy; of equals the last, as the field's trainers keep it."""
        return max(self.history, key=lambda row: (row["test_top1"], row["epoch"]))

    def train_epoch(self, epoch: int, progress: Progress, log: RunLog | None) -> Row:
        """One pass over the training images; its row of numbers."""
        loader = self.loaders.train
        meter = Meter(corrects=self.config.DISTILLER.CORRECTION != "none").to(self.world.device)
        loader.set_epoch(epoch)
        self.distiller.set_epoch(epoch)
        self.model.train()
        start = time.perf_counter()
        lr, images = self.schedule.get_last_lr()[0], 0

        def numbers() -> Row:
            return {**meter.peek(), "images_per_s": self.world.size * images / (time.perf_counter() - start)}

        for step, batch in enumerate(loader, (epoch - 1) * len(loader) + 1):
            out, logits = self._step(batch, epoch, step, lr)
            meter.update(out, logits, batch.labels)
            images += len(batch.labels)
            progress.step(epoch, numbers)
            if log is not None and step % self.config.LOG.TENSORBOARD_FREQ == 0:
                log.step(step, {"loss": out.loss.item(), "kd": out.kd.item(), "ce": out.ce.item(), "lr": lr})
        self.guard.flush()
        self.schedule.step()
        means = meter.compute()  # waits for the device, so the time below is the whole epoch's
        seconds = time.perf_counter() - start
        return {
            "epoch": epoch,
            "lr": lr,
            "temperature": self.distiller.temperature_now(),
            **{f"train_{name}": means[name] for name in ("loss", "kd", "ce", "top1")},
            "corrected": means["corrected"],
            "mean_rank": means["mean_rank"],
            "images_per_s": loader.samples / seconds,
            "seconds": seconds,
        }

    def evaluate(self) -> Row:
        """Top-1, top-5 and cross-entropy on the test images, over all ranks."""
        return evaluate(self.distiller.student, self.loaders.test, self.world, self.amp)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the generators and the configuration."""
        temperature = self.distiller.temperature
        return {
            "epoch": len(self.history),
            "model": self.distiller.student.state_dict(),
            "temperature": {} if temperature is None else temperature.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": dict(self.best),
            "history": [dict(row) for row in self.history],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.distiller.student.load_state_dict(state["model"])
        if self.distiller.temperature is not None:
            self.distiller.temperature.load_state_dict(state["temperature"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = [dict(row) for row in state["history"]]

    def _step(self, batch: Batch, epoch: int, step: int, lr: float) -> tuple[SortKDOutput, Tensor]:
        teacher = None if self.teacher is None else self.teacher.logits(batch)
        with torch.autocast(self.world.device.type, self.amp, enabled=self.amp is not None):
            logits, temperature = self.model(batch.images)
        out = self.loss(logits, teacher, batch.labels, temperature, epoch)
        self.guard.check(
            out,
            logits=logits.detach(),
            teacher=teacher,
            batch=batch,
            epoch=epoch,
            step=step,
            rank=self.world.rank,
            lr=lr,
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(out.loss * batch.share).backward()  # the ranks' parts of a last batch may differ in size
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return out, logits


@torch.no_grad()
def evaluate(student: nn.Module, loader: Loader, world: World, amp: torch.dtype | None) -> Row:
    """Top-1, top-5 and cross-entropy of `student` on a loader's images, over all ranks."""
    same_buffers(student, world)
    student.eval()
    meter = Meter().to(world.device)
    for batch in loader:
        with torch.autocast(world.device.type, amp, enabled=amp is not None):
            logits = student(batch.images)
        ce = F.cross_entropy(logits.float(), batch.labels)
        nothing = torch.zeros_like(ce)
        meter.update(SortKDOutput(ce, nothing, ce, torch.zeros_like(batch.labels)), logits, batch.labels)
    means = meter.compute()
    return {f"test_{name}": means[name] for name in ("ce", "top1", "top5")}
