"""Checkpoints that survive a kill at any moment: written whole or not at all, checked when read."""

from __future__ import annotations

import random
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data.files import atomic_file


class DamagedCheckpoint(RuntimeError):
    """A file that is not, or no longer, a checkpoint of this trainer."""


class Checkpoints:
    """The folder of a run's checkpoints: the newest two, the best, and every `keep_every`-th epoch's."""

    def __init__(self, folder: Path, keep_every: int) -> None:
        self.folder = folder
        self.keep_every = keep_every

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch so far."""
        return self.folder / "best.pth"

    def path(self, epoch: int) -> Path:
        """Where the state after `epoch` goes."""
        return self.folder / f"epoch_{epoch:04d}.pth"

    def epochs(self) -> dict[int, Path]:
        """The checkpoints there are, the newest first."""
        found = {}
        for path in self.folder.glob("epoch_*.pth"):
            if match := re.fullmatch(r"epoch_(\d+)\.pth", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items(), reverse=True))

    def save(self, epoch: int, state: dict[str, Any], *, is_best: bool) -> None:
        """Write the state after `epoch`, then drop what is older than the one before it."""
        # The best goes first: killed between the two, the epoch runs again and writes the same best again.
        if is_best:
            write(self.best, state)
        write(self.path(epoch), state)
        for number, path in list(self.epochs().items())[2:]:
            if number % self.keep_every:
                path.unlink()

    def newest(self) -> Path | None:
        """The newest checkpoint that can be read, with a warning for each damaged one; None where there is none."""
        found = self.epochs()
        for path in found.values():
            try:
                read(path)
            except DamagedCheckpoint as error:
                warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
            else:
                return path
        if found:
            raise DamagedCheckpoint(f"--resume: expected a whole checkpoint in {self.folder}, got {len(found)} damaged")
        return None


def write(path: Path, state: dict[str, Any]) -> None:
    """Save `state` so that `path` holds either its old content or all of the new, whenever the process is killed."""
    with atomic_file(path) as file:
        torch.save(state, file)


def read(path: Path) -> dict[str, Any]:
    """The state in a file, running no code from it; `DamagedCheckpoint` where anything is wrong with the file."""
    try:
        # torch.load compares no checksums; the zip archive has them.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        state = None if broken else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes in the file decide what is raised: no shorter list is complete
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"checkpoint: expected a whole file at {path}, got: {reason}") from error
    if not isinstance(state, dict) or "epoch" not in state:
        found = f"a wrong checksum in {broken}" if broken else "the state of something else"
        raise DamagedCheckpoint(f"checkpoint: expected the state of a run in {path}, got {found}")
    return state


def generator_states(device: torch.device | None = None) -> dict[str, Any]:
    """The states of the host's random generators and, if it is a GPU, the `device`'s, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device is not None and device.type == "cuda" else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_generator_states(states: dict[str, Any], device: torch.device | None = None) -> None:
    """Put back what `generator_states` returned, perhaps for another device."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and device is not None and device.type == "cuda":
        # Older checkpoints hold all GPUs' states, in order.
        torch.cuda.set_rng_state(states["cuda"][min(device.index, len(states["cuda"]) - 1)], device)
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


def seed_everything(seed: int) -> None:
    """Seed every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
