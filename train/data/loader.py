"""What every loader is: batches of a plan, read on the training device from memory that stays where it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import BatchPlan, Part, ViewPlan

# The teacher's logits, float16 `[B, num_classes]` on the host, of the images `index` in the fixed views `view`.
CachedRows = Callable[[Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """What a step reads of one rank's batch, on the training device.

    Attributes:
        images: float32 ``[B, C, H, W]``, normalised, channels_last.
        labels: int64 ``[B]``.
        teacher: the teacher's logits, float16 ``[B, num_classes]``, where a cache serves them.
    """

    images: Tensor
    labels: Tensor
    teacher: Tensor | None


class Batch(NamedTuple):
    """One rank's batch for those who iterate: `Inputs` with the plan's `Part`, which lies on the host."""

    images: Tensor
    labels: Tensor
    index: Tensor
    view: Tensor | None
    share: float


class Loader(ABC):
    """Batches of a data set by a plan. The seed and `set_epoch` fully determine order and augmentation.

    A pass is `parts()`, and one `read` for each part. What `read` does is a function of device memory alone, which the
    pass fills: so a step that reads can be captured as a CUDA graph. One pass at a time.
    """

    def __init__(
        self,
        labels: Tensor,
        plan: BatchPlan,
        *,
        device: torch.device,
        views: int = 0,
        view_seed: int = 0,
    ) -> None:
        """`view_seed` fixes the M `views`; which one comes when is the plan's seed's choice."""
        self.labels, self.plan, self.device = labels, plan, device
        self.views, self.view_seed, self.epoch = views, view_seed, 0
        self._view_plan = ViewPlan(len(labels), views, seed=plan.seed) if views else None
        self._cached_rows: CachedRows | None = None
        self._teacher: Tensor | None = None

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.plan)

    @property
    def samples(self) -> int:
        """Images of the data set, all ranks together."""
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next pass reads; resuming needs nothing else."""
        self.epoch = epoch

    def use_cache(self, rows: CachedRows, num_classes: int) -> None:
        """Serve the logits of a teacher cache with the images; before the first pass."""
        if not self.views:
            raise ValueError("use_cache: expected a loader of fixed views, got one that augments afresh")
        self._cached_rows = rows
        self._teacher = torch.zeros(self._held, num_classes, dtype=torch.float16, device=self.device)

    @property
    @abstractmethod
    def _held(self) -> int:
        """How many images' numbers are on the device at a time."""

    def parts(self) -> Iterator[Part]:
        """A pass over the epoch: this rank's parts in order, each to be read before the next is asked for."""
        parts: Iterable[Part] = self.plan.batches(self.epoch)
        if self._view_plan is not None:
            parts = [part._replace(view=self._view_plan.of(part.index, self.epoch)) for part in parts]
        return self._load(list(parts), self.epoch)

    @abstractmethod
    def read(self, count: int) -> Inputs:
        """The batch of `count` images that the pass has come to; its memory is the caller's."""

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches of the epoch."""
        return self._batches(self.parts())

    def view_batches(self, view: int, batch_size: int) -> Iterator[Batch]:
        """All images of the data set, on this rank, in order, in one of the fixed views: what fills a teacher cache."""
        if not 0 <= view < self.views:
            raise ValueError(f"view_batches: expected a view in [0, {self.views}), got {view}")
        split = torch.arange(self.samples).split(batch_size)
        return self._batches(self._load([Part(index, 1.0, torch.full_like(index, view)) for index in split], 0))

    def _batches(self, parts: Iterator[Part]) -> Iterator[Batch]:
        for part in parts:
            images, labels, _ = self.read(len(part.index))
            yield Batch(images, labels, part.index, part.view, part.share)

    @abstractmethod
    def _load(self, parts: list[Part], epoch: int) -> Iterator[Part]:
        """The parts, in order; when one is yielded, what `read` reads of it is on the device."""

    @abstractmethod
    def data_digest(self) -> str:
        """A digest of the images (or of what stands for them) and labels, in order: part of a teacher cache's key."""

    @property
    @abstractmethod
    def augmentation(self) -> dict[str, object]:
        """What happens to an image before the network sees it, as JSON values: part of a teacher cache's key."""
