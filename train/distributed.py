"""One process or many: torchrun's environment, the device of a rank, and what the ranks must agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
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


def same_buffers(module: nn.Module, world: World) -> None:
    """Give every rank the main rank's buffers: each kept BatchNorm statistics of its own rows."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
