"""ImageFolder trees: the listing of a split, its images from disk, and small images decoded once into memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder


class Listing:
    """The images of ``root/<class>/*``, classes in alphabetical order, as torchvision's ImageFolder lists them."""

    def __init__(self, root: Path) -> None:
        folder = ImageFolder(os.fspath(root))
        self.root, self.classes = root, folder.classes
        # Byte strings in one array: a list of a million strings would be copied into every worker, page by page, as
        # their reference counts change.
        self._paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in folder.samples])
        self.labels = torch.tensor(folder.targets, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / os.fsdecode(bytes(self._paths[index]))

    def read(self, index: int) -> Image.Image:
        """Image `index`, decoded, RGB."""
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"cannot read the image {path}: {error}; remove it or fetch it again") from error

    def digest(self) -> str:
        """A digest of the images' names, labels and sizes in bytes.

        It stands for the images' contents, which for a large tree would take longer to read than to train on.
        """
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            size = self.path(index).stat().st_size
            digest.update(repr((bytes(self._paths[index]), label, size)).encode())
        return digest.hexdigest()[:32]


def find_split(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the folders `names` in `root` that is there."""
    return next((root / name for name in names if (root / name).is_dir()), None)


class _SameSize(Dataset[Tensor]):
    """Images of one size, as uint8 ``[H, W, 3]``."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.size = listing.read(0).size

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> Tensor:
        image = self.listing.read(index)
        if image.size != self.size:
            raise ValueError(
                f"expected every image of {self.listing.root} of the first one's size, {self.size[0]} x "
                f"{self.size[1]}, got {image.size[0]} x {image.size[1]} in {self.listing.path(index)}"
            )
        return torch.from_numpy(np.array(image))


def decode_all(listing: Listing, num_workers: int) -> Tensor:
    """All images of `listing`, which are small and of one size: uint8 ``[N, H, W, 3]``.

    Decoded anew at every start: 50,000 images take 3 s in two workers, less than keeping a second copy on disk in
    step with the tree is worth.
    """
    workers = min(num_workers, len(listing) // 1000)  # starting one costs more than decoding a few hundred images
    batches = DataLoader(_SameSize(listing), batch_size=256, num_workers=workers, generator=torch.Generator())
    return torch.cat([batch.clone() for batch in batches])  # clones: a worker's batch holds a shared-memory handle
