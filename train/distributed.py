"""One process or many: torchrun's environment, the device of a rank, and what the ranks must agree on."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import ConfigError


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the terminal."""
        return self.rank == 0


@contextmanager
def join(device: str = "auto") -> Iterator[World]:
    """The world that torchrun set up, joined while the context lasts; alone where it did not."""
    chosen = _device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # the shapes stay the same; on a GPU bits are not promised
    if "WORLD_SIZE" not in os.environ:
        yield World(chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        # DistributedDataParallel is in reference cycles and holds the group. One that outlives this line lives on into
        # the interpreter's end, where a worker thread of gloo that still has a tensor to free aborts the process.
        gc.collect()
        dist.destroy_process_group()


def wrap(module: nn.Module, world: World) -> nn.Module:
    """`module` with its gradients averaged over the ranks."""
    if world.size == 1:
        return module
    return DistributedDataParallel(module, device_ids=[world.device] if world.device.type == "cuda" else None)


def gather(value: Any, world: World) -> list[Any]:
    """Every rank's `value`, in order of rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], Any], world: World) -> Any:
    """What `work` returns on the main rank, on every rank.

    What it raises is raised on every rank too: those that went on alone would wait for the main one.
    """
    value: Any = None
    error: Exception | None = None
    if world.is_main:
        try:
            value = work()
        except Exception as raised:
            error = raised
    value, error = gather((value, error), world)[0]
    if error is not None:
        raise error
    return value


def same_buffers(module: nn.Module, world: World) -> None:
    """Give every rank the main rank's buffers: each kept BatchNorm statistics of its own rows."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def _device(name: str) -> torch.device:
    """The device that EXPERIMENT.DEVICE means for this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"EXPERIMENT.DEVICE: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    # torchrun numbers the processes of a machine, and each takes a GPU of its own.
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"EXPERIMENT.DEVICE: expected GPU {index} to be there, got {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)
