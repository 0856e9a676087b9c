"""Large images, decoded and augmented one by one in worker processes, as ImageNet needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop, v2

from .augment import Normalize
from .folder import ImageReadMode, Listing, decode_jpeg, last_line
from .loader import Inputs, Loader
from .plan import BatchPlan, Part
from .seeds import derive_seed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP, RESIZE = 224, 256

# What a worker is asked for: a data set index, and the seed of what happens to that image.
_Key = tuple[int, int]


class Images(Dataset[Tensor]):
    """Cropped images, uint8 ``[224, 224, 3]``: normalised on the training device, a quarter of the bytes to move."""

    def __init__(self, listing: Listing, *, train: bool) -> None:
        self.listing = listing
        self.transform = _random_crop_flip if train else v2.Compose([v2.Resize(RESIZE), v2.CenterCrop(CROP)])

    def __getitem__(self, key: _Key) -> Tensor:
        index, seed = key
        return self.crop(self.listing.read(index), seed)

    def crop(self, image: Tensor, seed: int) -> Tensor:
        """The crop of a decoded image ``[3, H, W]`` that `seed` determines, on its device."""
        # torchvision's transforms draw from the global generator. Seeded for this image alone, it gives the same
        # crop in any worker, and is handed back as it was for where there are no workers.
        # (Not torch.manual_seed, which queues a call for every GPU, with a stack trace, each time.)
        state = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(seed)
            image = self.transform(image)
        finally:
            torch.default_generator.set_state(state)
        return image.permute(1, 2, 0).contiguous()


def _random_crop_flip(image: Tensor) -> Tensor:
    """torchvision's ``RandomResizedCrop(224)`` and ``RandomHorizontalFlip()``, from the same draws of the generator.

    The modules would cost a sixth of an image's time: they part a pixel's three values, and resizing is slower then.
    """
    top, left, height, width = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    if image.is_cuda:  # where interpolation takes no uint8
        image = v2.functional.resized_crop(image, top, left, height, width, [CROP, CROP], antialias=True)
    else:
        crop = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        image = F.interpolate(crop, (CROP, CROP), mode="bilinear", antialias=True)[0]
    return image.flip(-1) if torch.rand(1) < 0.5 else image


class _Files(Dataset[tuple[Tensor, _Key]]):
    """The files as they are, each with its key: for a GPU to decode."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing

    def __getitem__(self, key: _Key) -> tuple[Tensor, _Key]:
        return self.listing.file(key[0]), key


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
        decode: str = "cpu",
    ) -> None:
        """`decode`: cpu, in the workers; cuda, on `device`, by torchvision's nvJPEG, the workers reading the files."""
        super().__init__(listing.labels, plan, device=device, views=views, view_seed=view_seed)
        if decode == "cuda" and decode_jpeg is None:
            raise ValueError("StreamLoader: expected decode cpu with this torchvision, which has no decoder, got cuda")
        self.listing, self.train, self.decode = listing, train, decode
        self._crops = Images(listing, train=train)
        self._normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, (3, CROP, CROP), device=device)
        self._keys = _Keys(plan.seed, view_seed)
        self._loader = DataLoader(
            self._crops if decode == "cpu" else _Files(listing),
            collate_fn=None if decode == "cpu" else list,
            batch_sampler=self._keys,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda" and decode == "cpu",  # nvJPEG takes its bytes from the host
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
            for batch in self._loader:
                yield batch if self.decode == "cpu" else self._decoded_on_device(batch)
        except ValueError as error:  # an image whose damage `Listing.check` cannot see
            raise OSError(f"DATASET.ROOT: {last_line(error)}") from error

    def _decoded_on_device(self, batch: list[tuple[Tensor, _Key]]) -> Tensor:
        """The crops of a batch of files. Where the device's decoder refuses one (CMYK), the host decodes all."""
        try:
            images = decode_jpeg([file for file, _ in batch], ImageReadMode.RGB, device=self.device)
        except RuntimeError:
            images = [self.listing.read(index).to(self.device) for _, (index, _) in batch]
        return torch.stack([self._crops.crop(image, seed) for image, (_, (_, seed)) in zip(images, batch, strict=True)])

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
            "decode": self.decode,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "image_shape": [3, CROP, CROP],
        }
