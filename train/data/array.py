"""Small images, all of them in memory as uint8, augmented in batches on the training device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import CropFlip, Normalize, draw_crop_flip
from .loader import Loader, Request, collect
from .plan import BatchPlan
from .seeds import generator

# Images augmented at once: enough to pay for the calls' fixed cost, few enough for 3 KB each to stay in a CPU's cache.
_AT_ONCE = 256


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch's CPU kernels on the calling thread.

    A batch is 0.15 ms of work, made of calls of 10 us: a second core would take a third off, but wherever the cores are
    shared every call then waits for its slowest thread to be scheduled, which takes milliseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        self._epoch_table: tuple[int, Tensor] | None = None

    def _images(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        buffer = self._crop_flip.buffer(0)
        for group in collect(requests, _AT_ONCE):
            index = torch.cat([request.index for request in group])
            # One buffer for the whole pass: between the batches that come and go, a block of its own would have the
            # C library give pages back and fetch them again, which takes as long as all the rest.
            if len(buffer) < len(index):
                buffer = self._crop_flip.buffer(len(index))
            with _one_thread():
                choices = torch.cat([self._choices(request) for request in group])
                crops = self._crop_flip(index, choices, buffer[: len(index)])
            for part in crops.split([len(request.index) for request in group]):
                with _one_thread():
                    images = self._normalize(part)
                yield images

    def _choices(self, request: Request) -> Tensor:
        """Where each image of `request` is cropped and whether it is flipped.

        Drawn for all images of the data set at once, by image and not by place in the batch: so neither the order nor
        the number of ranks changes what is done to an image.
        """
        if request.view is None:
            if self._epoch_table is None or self._epoch_table[0] != request.epoch:
                self._epoch_table = request.epoch, self._draw("augmentation", self.plan.seed, request.epoch)
            return self._epoch_table[1][request.index]
        if self._view_table is None:
            draws = [self._draw("view", self.view_seed, view) for view in range(self.views)]
            self._view_table = torch.stack(draws)
        return self._view_table[request.view, request.index]

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
