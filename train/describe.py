"""What `--dry-run` tells of a configuration's models: parameters and multiply-accumulates, computing nothing."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .assembly import check_fits, make_loaders, make_model
from .distributed import World
from .naming import method_label, run_folder
from .schema import Config

# Classes and image shape, so that the data need not be there; an image folder's depend on what is in it.
_SHAPES = {
    "cifar100": (100, (3, 32, 32)),
    "cifar10": (10, (3, 32, 32)),
    "tiny_imagenet": (200, (3, 64, 64)),
    "imagenet": (1000, (3, 224, 224)),
    "digits": (10, (1, 8, 8)),
}


def describe(config: Config) -> str:
    """A few lines: the run, and each model's parameters and multiply-accumulates for one image."""
    if config.DATASET.TYPE in _SHAPES:
        classes, shape = _SHAPES[config.DATASET.TYPE]
    else:
        _, _, classes, shape = make_loaders(config, World(torch.device("cpu")))
    names = {"student": config.DISTILLER.STUDENT}
    if config.DISTILLER.TYPE != "NONE":
        names = {"teacher": config.DISTILLER.TEACHER, **names}
    lines = [f"{method_label(config)}, run folder {run_folder(config)}"]
    for role, name in names.items():
        with torch.device("meta"):  # shapes alone: no memory, no arithmetic
            model = make_model(f"DISTILLER.{role.upper()}", config, classes, shape)
            check_fits(f"DISTILLER.{role.upper()}", model, classes, shape)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        macs = count_macs(model, shape)
        lines.append(f"{role} {name}: {parameters:,} parameters, {macs:,} multiply-accumulates a {_times(shape)} image")
    return "\n".join(lines)


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image's forward pass, from torch's own table of operators."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, *shape, device=device))
    return counter.get_total_flops() // 2


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
