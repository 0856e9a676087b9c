"""The training loop: epochs, evaluation, and the state that a resumed run starts from."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from .data import Loader, Loaders
from .distillers import Distiller, build_loss, kd_warm_up
from .distributed import World, same_buffers, wrap
from .graphs import Graphed
from .guard import Guard
from .logs import Progress, Row, RunLog
from .meter import Meter
from .schema import Config
from .solver import AMP_DTYPES, Solver
from .step import EvaluationStep, TrainingStep
from .teacher import CachedTeacher, Teacher

# What a loop hands out: nothing after every step, so that other runs may have a turn, and its numbers at the end.
Steps = Generator[None, None, Row]


class Trainer:
    """A student in training; `history` holds a row of numbers for each finished epoch."""

    def __init__(
        self, config: Config, loaders: Loaders, distiller: Distiller, teacher: Teacher | None, world: World
    ) -> None:
        self.config, self.loaders, self.teacher, self.world = config, loaders, teacher, world
        self.history: list[Row] = []
        device, solver, train = world.device, config.SOLVER, loaders.train
        self.distiller = distiller.to(device, memory_format=torch.channels_last)
        # DDP's own streams and buckets need a warm-up and settings of their own to be captured: left out.
        graphs = solver.GRAPH == "auto" and world.size == 1
        self.solver = Solver(config, self.distiller, device, graphs=graphs)  # before the compiler: an average is a copy
        if solver.COMPILE:
            self.distiller.student.compile(dynamic=False)
        self.amp = AMP_DTYPES[solver.AMP]
        self.meter = Meter(device, corrects=config.DISTILLER.CORRECTION != "none")
        self.guard = Guard(train.plan.batch_size, loaders.num_classes, device)
        if isinstance(teacher, CachedTeacher):
            train.use_cache(teacher.rows, loaders.num_classes)
        self.step = TrainingStep(
            train, wrap(self.distiller, world), None if isinstance(teacher, CachedTeacher) else teacher,
            build_loss(config), self.solver, self.meter, self.guard, amp=self.amp, parts=solver.ACCUMULATION,
        )  # fmt: skip
        self._train_step = Graphed(self.step, device, enabled=graphs, name="training step")
        self.evaluation = Evaluation(self.tested, loaders.test, world, self.amp, graphs=graphs)

    @property
    def tested(self) -> nn.Module:
        """The student whose numbers count: the average where there is one."""
        return self.distiller.student if self.solver.average is None else self.solver.average.student

    @property
    def best(self) -> Row:
        """The epoch with the highest test accuracy; of equals the last, as the field's trainers keep it."""
        return max(self.history, key=lambda row: (row["test_top1"], row["epoch"]))

    def train_epoch(self, epoch: int, progress: Progress, log: RunLog | None) -> Steps:
        """One pass over the training images; its row of numbers."""
        loader, lr = self.loaders.train, self.solver.lr
        self.meter.reset()
        self.guard.reset()
        loader.set_epoch(epoch)
        self.distiller.set_epoch(epoch)
        self.solver.begin_epoch()
        self.distiller.train()
        warm_up = kd_warm_up(self.config, epoch)
        done: list[Tensor] = []  # the images of each step
        start = time.perf_counter()

        def check() -> Row:
            facts = {"epoch": epoch, "rank": self.world.rank, "lr": lr}
            return self.guard.check(done, loader.labels, teacher=self.teacher is not None, **facts)

        def numbers() -> Row:
            check()
            means, images = self.meter.means(), sum(map(len, done))
            return {**means, "images_per_s": self.world.size * images / (time.perf_counter() - start)}

        for step, part in enumerate(loader.parts(), (epoch - 1) * len(loader) + 1):
            self._train_step(len(part.index), part.share, warm_up)
            done.append(part.index)
            progress.step(epoch, numbers)
            if log is not None and step % self.config.LOG.TENSORBOARD_FREQ == 0:
                log.step(step, {**check(), "lr": lr})
            yield
        check()
        self.solver.end_epoch()
        means = self.meter.means(self.world)
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

    def evaluate(self) -> Steps:
        """Top-1, top-5 and cross-entropy on the test images, over all ranks."""
        same_buffers(self.distiller.student, self.world)  # as a resumed run would find them
        return (yield from self.evaluation.steps())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the generators and the configuration; `model` is the student as tested."""
        temperature = self.distiller.temperature
        return {
            "epoch": len(self.history),
            "model": self.tested.state_dict(),
            **({} if self.solver.average is None else {"averaged_from": self.distiller.student.state_dict()}),
            "temperature": {} if temperature is None else temperature.state_dict(),
            **self.solver.state(),
            "best": dict(self.best),
            "history": [dict(row) for row in self.history],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.tested.load_state_dict(state["model"])
        if self.solver.average is not None:
            self.distiller.student.load_state_dict(state["averaged_from"])
        if self.distiller.temperature is not None:
            self.distiller.temperature.load_state_dict(state["temperature"])
        self.solver.load(state)
        self.history = [dict(row) for row in state["history"]]


class Evaluation:
    """A student's numbers on a loader's images: every rank has its share of them."""

    def __init__(
        self, student: nn.Module, loader: Loader, world: World, amp: torch.dtype | None, *, graphs: bool
    ) -> None:
        self.student, self.loader, self.world = student, loader, world
        self._meter = Meter(world.device)
        step = EvaluationStep(loader, student, self._meter, amp=amp)
        self._step = Graphed(step, world.device, enabled=graphs, name="evaluation")

    def steps(self) -> Steps:
        """Top-1, top-5 and cross-entropy."""
        same_buffers(self.student, self.world)
        self.student.eval()
        self._meter.reset()
        for part in self.loader.parts():
            self._step(len(part.index))
            yield
        means = self._meter.means(self.world)
        return {f"test_{name}": means[name] for name in ("ce", "top1", "top5")}
