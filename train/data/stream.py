"""Large images, decoded and augmented one by one in worker processes, as ImageNet needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .augment import Normalize
from .folder import Listing, last_line
from .loader import Inputs, Loader
from .plan import BatchPlan, Part
from .seeds import derive_seed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP, RESIZE = 224, 256

# What a worker is asked for: a data set index, and the seed of what happens to that image.
_Key = tuple[int, int]


class _Images(Dataset[Tensor]):
    """Cropped images, uint8 ``[224, 224, 3]``: normalised on the training device, a quarter of the bytes to move."""

    def __init__(self, listing: Listing, *, train: bool) -> None:
        self.listing = listing
        self.transform = (
            v2.Compose([v2.RandomResizedCrop(CROP), v2.RandomHorizontalFlip()])
            if train
            else v2.Compose([v2.Resize(RESIZE), v2.CenterCrop(CROP)])
        )

    def __getitem__(self, key: _Key) -> Tensor:
        index, seed = key
        image = self.listing.read(index)
        # torchvision's transforms draw from the global generator. Seeded for this image alone, it gives the same
        # crop in any worker, and is handed back as it was for where there are no workers.
        # (Not torch.manual_seed, which queues a call for every GPU, with a stack trace, each time.)
        state = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(seed)
            image: Image.Image = self.transform(image)
        finally:
            torch.default_generator.set_state(state)
        return torch.from_numpy(np.array(image))


class _Keys:
    """The batch sampler: what the next iteration over the DataLoader asks for.

    It lives in the main process, so that workers know nothing of epochs and can stay alive from one to the next; it
    works batch by batch, because the keys of a million images would take seconds and a few hundred megabytes.
    """

    def __init__(self, seed: int, view_seed: int) -> None:
        self.seed, self.view_seed, self.epoch = seed, view_seed, 0
        self.parts: list[Part] = []

    def __iter__(self) -> Iterator[list[_Key]]:
        return map(self._keys, self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def _keys(self, part: Part) -> list[_Key]:
        index = part.index.tolist()
        if part.view is None:
            return [(i, derive_seed("augmentation", self.seed, self.epoch, i)) for i in index]
        return [(i, derive_seed("view", self.view_seed, v, i)) for i, v in zip(index, part.view.tolist(), strict=True)]


class StreamLoader(Loader):
    """Batches of an ImageFolder tree of large images: random resized crop 224 and flip, or resize 256, centre crop."""

    def __init__(
        self,
        listing: Listing,
        plan: BatchPlan,
        *,
        device: torch.device,
        train: bool,
        num_workers: int = 0,
        views: int = 0,
        view_seed: int = 0,
    ) -> None:
        super().__init__(listing.labels, plan, device=device, views=views, view_seed=view_seed)
        self.listing, self.train = listing, train
        self._normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, (3, CROP, CROP), device=device)
        self._keys = _Keys(plan.seed, view_seed)
        self._loader = DataLoader(
            _Images(listing, train=train),
            batch_sampler=self._keys,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            # Its own generator: a DataLoader draws a seed from the global one at every start otherwise, so that how
            # often data was read would change what the model draws.
            generator=torch.Generator(),
        )

        # The batch that `read` reads: copied into the same memory every time.
        self._images = torch.zeros(0, CROP, CROP, 3, dtype=torch.uint8, device=device)
        self._labels = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def _held(self) -> int:
        return self.plan.batch_size

    def _load(self, parts: list[Part], epoch: int) -> Iterator[Part]:
        self._keys.parts, self._keys.epoch = parts, epoch
        largest = max((len(part.index) for part in parts), default=0)
        if len(self._images) < largest:  # once: all passes of a run are of the same batches
            self._images = self._images.new_zeros(largest, *self._images.shape[1:])
            self._labels = self._labels.new_zeros(largest)
        for part, images in zip(parts, self._decoded(), strict=True):
            count = len(part.index)
            self._images[:count].copy_(images, non_blocking=True)
            self._labels[:count].copy_(self.labels[part.index])
            if self._cached_rows is not None:
                self._teacher[:count].copy_(self._cached_rows(part.view, part.index))
            yield part

    def _decoded(self) -> Iterator[Tensor]:
        try:
            yield from self._loader
        except ValueError as error:  # an image whose damage `Listing.check` cannot see
            raise OSError(f"DATASET.ROOT: {last_line(error)}") from error

    def read(self, count: int) -> Inputs:
        """The batch that came last, normalised on the device."""
        teacher = None if self._teacher is None else self._teacher[:count]
        return Inputs(self._normalize(self._images[:count]), self._labels[:count].clone(), teacher)

    def data_digest(self) -> str:
        """A digest of the files' names, labels and sizes."""
        return self.listing.digest()

    @property
    def augmentation(self) -> dict[str, object]:
        """Crop, flip and normalisation."""
        return {
            "kind": "random resized crop and flip" if self.train else "resize and centre crop",
            "crop": CROP,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "image_shape": [3, CROP, CROP],
        }
