"""What every loader is: batches of a plan, already on the training device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import BatchPlan, ViewPlan


class Batch(NamedTuple):
    """One rank's batch.

    Attributes:
        images: float32 ``[B, C, H, W]``, normalised, channels_last, on the training device.
        labels: int64 ``[B]``, on the training device.
        index: int64 ``[B]``, the images' places in the data set. On the host, as is `view`: the teacher cache is a
            file, and fetching indices back from a GPU would stall it every step.
        view: int64 ``[B]``, which of the fixed views each image shows, or None where augmentation is fresh.
        share: ``B * world_size`` over the global batch's size: 1, but for a last batch that the ranks cannot split
            evenly. The mean over ranks of ``share * (mean over B)`` is the global batch's mean.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    view: Tensor | None = None
    share: float = 1.0


class Request(NamedTuple):
    """The images `index`, augmented afresh for `epoch` or, where there are fixed views, by `view`."""

    index: Tensor
    view: Tensor | None
    epoch: int


class Loader(ABC):
    """Batches of a data set by a plan. The seed and `set_epoch` fully determine order and augmentation."""

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

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.plan)

    @property
    def samples(self) -> int:
        """Images of the data set, all ranks together."""
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next iteration yields; resuming needs nothing else."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches of the epoch."""
        parts = list(self.plan.batches(self.epoch))
        views = [self._view_plan.of(part.index, self.epoch) if self._view_plan else None for part in parts]
        requests = [Request(part.index, view, self.epoch) for part, view in zip(parts, views, strict=True)]
        for request, part, images in zip(requests, parts, self._images(requests), strict=True):
            yield self._batch(request, images, part.share)

    def view_batches(self, view: int, batch_size: int) -> Iterator[Batch]:
        """All images of the data set, on this rank, in order, in one of the fixed views: what fills a teacher cache."""
        if not 0 <= view < self.views:
            raise ValueError(f"view_batches: expected a view in [0, {self.views}), got {view}")
        parts = torch.arange(self.samples).split(batch_size)
        requests = [Request(index, torch.full_like(index, view), 0) for index in parts]
        for request, images in zip(requests, self._images(requests), strict=True):
            yield self._batch(request, images, 1.0)

    def _batch(self, request: Request, images: Tensor, share: float) -> Batch:
        labels = to_device(self.labels[request.index], self.device)
        return Batch(images, labels, request.index, request.view, share)

    @abstractmethod
    def _images(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """For each request, in order, `Batch.images`."""

    @abstractmethod
    def data_digest(self) -> str:
        """A digest of the images (or of what stands for them) and labels, in order: part of a teacher cache's key."""

    @property
    @abstractmethod
    def augmentation(self) -> dict[str, object]:
        """What happens to an image before the network sees it, as JSON values: part of a teacher cache's key."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; through pinned memory to a GPU, so that the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collect(requests: Iterable[Request], images: int) -> Iterator[list[Request]]:
    """Groups of consecutive requests of at least `images` images together (the last group may have fewer)."""
    group: deque[Request] = deque()
    count = 0
    for request in requests:
        group.append(request)
        count += len(request.index)
        if count >= images:
            yield list(group)
            group.clear()
            count = 0
    if group:
        yield list(group)
