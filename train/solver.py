"""What changes the weights: optimizer, learning rate, loss scale, clipping, and the average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .distillers import Distiller
from .schema import Config

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a checkpoint must not bring from the device where it was written.
_PLACEMENT = ("fused", "foreach", "capturable")


class Solver:
    """The optimizer of a distiller's parameters and all that goes with it, made of torch's own parts.

    On a GPU the optimizer is torch's fused one, which reads the learning rate, the loss scale and whether a gradient
    overflowed from the device: so a captured update follows them.
    """

    def __init__(self, config: Config, distiller: Distiller, device: torch.device, *, graphs: bool) -> None:
        self.clip = config.SOLVER.CLIP_NORM
        self.parameters = list(distiller.parameters())
        self.optimizer = build_optimizer(config, self.parameters, device, graphs=graphs)
        self.schedule = build_schedule(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.SOLVER.AMP == "fp16")
        self._lr_on_device = torch.zeros((), device=device) if device.type == "cuda" else None
        self.average = Average(distiller.student, config.SOLVER.EMA) if config.SOLVER.EMA else None

    @property
    def lr(self) -> float:
        """The learning rate of the epoch."""
        return self.optimizer.param_groups[0]["lr"]

    def begin_epoch(self) -> None:
        """Put the learning rate where the update reads it."""
        if self._lr_on_device is not None:
            self._lr_on_device.fill_(self.lr)

    def step(self) -> None:
        """Update the weights from their gradients."""
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        (group,) = self.optimizer.param_groups
        lr = group["lr"]
        # The schedule and the checkpoints keep a float, which is the same on every device.
        group["lr"] = lr if self._lr_on_device is None else self._lr_on_device
        try:
            self.scaler.step(self.optimizer)
        finally:  # a capture may fail in it, after which the run goes on eagerly
            group["lr"] = lr
        self.scaler.update()
        if self.average is not None:
            self.average.update()

    def end_epoch(self) -> None:
        """Go on to the next epoch's learning rate."""
        self.schedule.step()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, but for the average."""
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        (group,) = self.optimizer.param_groups
        placement = {name: group[name] for name in _PLACEMENT if name in group}
        # Before loading: by these flags torch chooses the device of AdamW's step counts.
        groups = [saved | placement for saved in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


class Average:
    """The exponential moving average of a student's weights and statistics, as a student of its own.

    `AveragedModel` would do, but that it decides on the host, by a counter, whether to copy or to average, and a
    captured step has no such decisions: the average starts at the first weights.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.student = copy.deepcopy(student).requires_grad_(False)
        pairs = list(zip(self.student.state_dict().values(), student.state_dict().values(), strict=True))
        self._average: Callable[..., None] = get_ema_multi_avg_fn(decay)
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the student's weights as they are now."""
        self._average(*(list(side) for side in zip(*self._floats, strict=True)), None)
        for own, other in self._counters:
            own.copy_(other)


def build_optimizer(
    config: Config, parameters: list[Tensor], device: torch.device, *, graphs: bool
) -> torch.optim.Optimizer:
    """SOLVER.TYPE over `parameters`; with `graphs` its update may be captured."""
    solver, on_gpu = config.SOLVER, device.type == "cuda"
    options: dict[str, Any] = {"lr": solver.LR, "weight_decay": solver.WEIGHT_DECAY, "fused": on_gpu or None}
    if solver.TYPE == "AdamW":
        return torch.optim.AdamW(parameters, **options, capturable=on_gpu and graphs)
    optimizer = torch.optim.SGD(parameters, **options, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    if solver.MOMENTUM:
        # The fused update allocates the momentum in its first step and, where a gradient overflowed, leaves it
        # uninitialised. From zero the first step gives the same, the gradient, since nothing is dampened.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_schedule(config: Config, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The learning rate by epoch: SOLVER.SCHEDULE, after a linear rise over SOLVER.WARMUP epochs."""
    solver = config.SOLVER
    rise = solver.WARMUP
    main: LRScheduler
    if solver.SCHEDULE == "cosine":
        main = CosineAnnealingLR(optimizer, solver.EPOCHS - rise, solver.LR_MIN)
    else:  # the stages are epochs of the run, the rise included
        main = MultiStepLR(optimizer, [stage - rise for stage in solver.LR_DECAY_STAGES], solver.LR_DECAY_RATE)
    if not rise:
        return main
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (rise + 1), 1.0, rise), main], [rise])
