"""Small images, all of them in memory as uint8, augmented in batches on the training device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import CropFlip, Normalize, draw_crop_flip
from .loader import Inputs, Loader
from .plan import BatchPlan, Part
from .seeds import generator


@dataclass(frozen=True)
class ArrayData:
    """One split: uint8 ``images`` ``[N, H, W, C]``, int64 ``labels``, and what normalises them."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: float = 255.0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.images.shape
        return channels, height, width


class ArrayLoader(Loader):
    """Batches of an `ArrayData`; `padding` and `flip` are the augmentation, 0 and False for none."""

    def __init__(
        self,
        data: ArrayData,
        plan: BatchPlan,
        *,
        device: torch.device,
        padding: int = 0,
        flip: bool = False,
        views: int = 0,
        view_seed: int = 0,
    ) -> None:
        super().__init__(data.labels, plan, device=device, views=views, view_seed=view_seed)
        self.data, self.padding, self.flip = data, padding, flip
        self._crop_flip = CropFlip(data.images, padding, flip=flip, device=device)
        self._normalize = Normalize(data.mean, data.std, data.image_shape, device=device, peak=data.peak)
        self._view_table: Tensor | None = None
        # What an epoch draws, in its order: on the device once an epoch, in the same memory every time.
        self._first = torch.zeros(self.samples, dtype=torch.int64, device=device)
        self._labels = torch.zeros_like(self._first)
        self._place = torch.zeros((), dtype=torch.int64, device=device)  # how much of it has been read

    @property
    def _held(self) -> int:
        return self.samples  # an epoch's: the cached logits of CIFAR-100 take 10 MB

    def _load(self, parts: list[Part], epoch: int) -> Iterator[Part]:
        index = torch.cat([part.index for part in parts])
        view = torch.cat([part.view for part in parts]) if self.views else None
        count = len(index)
        self._first[:count].copy_(self._crop_flip.first(index, self._choices(index, view, epoch)))
        self._labels[:count].copy_(self.labels[index])
        if self._cached_rows is not None:
            self._teacher[:count].copy_(self._cached_rows(view, index))
        self._place.zero_()
        yield from parts

    def read(self, count: int) -> Inputs:
        """The next `count` images of the pass, gathered, cropped, flipped and normalised on the device."""
        at = self._place + torch.arange(count, device=self.device)
        self._place += count
        images = self._normalize(self._crop_flip(self._first.index_select(0, at)))
        teacher = None if self._teacher is None else self._teacher.index_select(0, at)
        return Inputs(images, self._labels.index_select(0, at), teacher)

    def _choices(self, index: Tensor, view: Tensor | None, epoch: int) -> Tensor:
        """Where each of the images `index` is cropped and whether it is flipped.

        Drawn for all images of the data set at once, by image and not by place in the batch: so neither the order nor
        the number of ranks changes what is done to an image.
        """
        if view is None:
            return self._draw("augmentation", self.plan.seed, epoch)[index]
        if self._view_table is None:
            self._view_table = torch.stack([self._draw("view", self.view_seed, v) for v in range(self.views)])
        return self._view_table[view, index]

    def _draw(self, *purpose: int | str) -> Tensor:
        return draw_crop_flip(self.samples, self.padding, self.flip, generator(*purpose))

    def data_digest(self) -> str:
        """A digest of every pixel and label, in order."""
        digest = hashlib.sha256(repr(tuple(self.data.images.shape)).encode())
        for tensor in (self.data.images, self.data.labels):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:32]

    @property
    def augmentation(self) -> dict[str, object]:
        """Crop, flip and normalisation."""
        data = self.data
        return {
            "kind": "crop and flip",
            "padding": self.padding,
            "flip": self.flip,
            "mean": list(data.mean),
            "std": list(data.std),
            "peak": data.peak,
            "image_shape": list(data.image_shape),
        }
