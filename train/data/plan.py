"""Which image comes when, on which rank, in which view: pure functions of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .seeds import generator


class Part(NamedTuple):
    """One rank's part of a global batch, on the host.

    Attributes:
        index: int64 ``[B]``, the images' places in the data set.
        share: ``B * world_size`` over the global batch's size: 1, but for a last batch that the ranks cannot split
            evenly. The mean over ranks of ``share * (mean over B)`` is the global batch's mean.
        view: int64 ``[B]``, which of the fixed views each image shows, or None where augmentation is fresh.
    """

    index: Tensor
    share: float
    view: Tensor | None = None


class BatchPlan:
    """An epoch's global batches, `batch_size * world_size` images each, dealt to the ranks in order.

    One rank with R times the batch sees the same global batches as R ranks. The last global batch may be short: its
    images are spread evenly. For training (`shuffle`) one with fewer images than ranks is left out, because every rank
    must come to the gradient exchange; for evaluation nothing is left out, and a rank without images skips that batch.
    """

    def __init__(
        self, samples: int, batch_size: int, *, shuffle: bool, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"BatchPlan: expected a batch size of at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchPlan: expected 0 <= rank < world_size, got rank {rank} of {world_size}")
        if shuffle and samples < world_size:
            raise ValueError(f"BatchPlan: expected at least one image for each of {world_size} ranks, got {samples}")
        self.samples, self.batch_size, self.shuffle, self.seed = samples, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Batches of this rank."""
        return sum(1 for _ in self._bounds())

    def _bounds(self) -> Iterator[tuple[int, int, int]]:
        """Of each of this rank's batches: first and last place in the epoch's order, and the global batch's size."""
        step = self.batch_size * self.world_size
        for start in range(0, self.samples, step):
            total = min(step, self.samples - start)
            first, last = (total * r // self.world_size for r in (self.rank, self.rank + 1))
            if last > first and not (self.shuffle and total < self.world_size):
                yield start + first, start + last, total

    def smallest(self) -> int:
        """The fewest images that a rank gets in a batch: those of the last global batch may be few."""
        step = self.batch_size * self.world_size
        last = self.samples % step
        if last < self.world_size and self.shuffle:  # left out
            last = 0
        return (last or step) // self.world_size

    def batches(self, epoch: int) -> Iterator[Part]:
        """This rank's parts of `epoch`, in order."""
        if self.shuffle:
            order = torch.randperm(self.samples, generator=generator("order", self.seed, epoch))
        else:
            order = torch.arange(self.samples)
        for first, last, total in self._bounds():
            yield Part(order[first:last], (last - first) * self.world_size / total)


class ViewPlan:
    """Which of the M fixed views each image shows in an epoch.

    Every image starts at its own random view and moves on by one an epoch: within an epoch the views mix as fresh
    augmentation would, and in any M epochs in a row each image shows each of its views once.
    """

    def __init__(self, samples: int, views: int, *, seed: int) -> None:
        self.views = views
        self._start = torch.randint(views, (samples,), generator=generator("first view", seed))

    def of(self, index: Tensor, epoch: int) -> Tensor:
        """The views of the images `index` in `epoch`, int64."""
        return (self._start[index] + epoch) % self.views
