"""The data: `build_loaders` gives a training and a test `Loader` of a data set.

Small images (CIFAR-100, digits) live in memory as uint8 and are augmented in batches on the training device; large ones
(ImageNet) are decoded by worker processes. Either way the seed and the epoch determine every batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from . import sources
from .array import ArrayData, ArrayLoader
from .folder import Listing
from .loader import Batch, Inputs, Loader
from .plan import BatchPlan
from .stream import StreamLoader

__all__ = [
    "DATASETS",
    "ArrayData",
    "ArrayLoader",
    "Batch",
    "BatchPlan",
    "Inputs",
    "Loader",
    "Loaders",
    "build_loaders",
    "evaluation_batch",
]

DATASETS = ("cifar100", "cifar10", "tiny_imagenet", "imagenet", "imagefolder", "digits")


class Loaders(NamedTuple):
    """A data set ready to train on; `image_shape` is (C, H, W)."""

    train: Loader
    test: Loader
    num_classes: int
    image_shape: tuple[int, int, int]


def evaluation_batch(asked: int, device: torch.device, *, small: bool) -> int:
    """Test images a batch: as asked for, but on a GPU at least as many as keep it busy; no number depends on it."""
    return asked if device.type == "cpu" else max(asked, 1000 if small else 256)


def build_loaders(
    dataset: str,
    root: Path,
    *,
    batch_size: int,
    test_batch_size: int,
    num_workers: int,
    device: torch.device,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    views: int = 0,
    view_seed: int | None = None,
    decode: str = "cpu",
) -> Loaders:
    """The loaders of `dataset`, one of `DATASETS`, whose files are in `root` (the digits need none).

    Args:
        dataset: cifar100 and cifar10 (official files, downloaded where missing, or a tree), tiny_imagenet (as its
            archive has it, or a tree), imagenet, imagefolder, digits.
        root: the folder of the data.
        batch_size: training images a batch, on each rank.
        test_batch_size: test images a batch, on each rank; on a GPU see `evaluation_batch`.
        num_workers: processes that decode images.
        device: where batches go, and where small images live.
        seed: with the epoch, determines order and augmentation.
        rank: this process among `world_size`, which share out every global batch.
        world_size: how many processes train together.
        views: M > 0 fixes M augmented views for each image, one of which it shows each epoch; 0 augments afresh.
        decode: where JPEGs of large images are decoded, cpu or cuda; on a GPU their pixels differ by a few levels.
        view_seed: fixes the views, `seed` where None. Runs of several seeds with one `view_seed` share a teacher cache.
    """
    root = Path(root).expanduser()
    if views < 0:
        raise ValueError(f"build_loaders: expected views of 0 or more, got {views}")
    if dataset in ("cifar100", "cifar10", "tiny_imagenet", "imagefolder"):
        splits = getattr(sources, dataset)(root, num_workers)
    elif dataset == "imagenet":
        splits = sources.imagenet(root)
    elif dataset == "digits":
        splits = sources.digits()
    else:
        raise ValueError(f"build_loaders: expected a data set out of {', '.join(DATASETS)}, got {dataset!r}")

    def loader(split: ArrayData | Listing, train: bool) -> Loader:
        samples = len(split) if isinstance(split, Listing) else len(split.labels)
        small = not isinstance(split, Listing)
        size = batch_size if train else evaluation_batch(test_batch_size, device, small=small)
        plan = BatchPlan(samples, size, shuffle=train, seed=seed, rank=rank, world_size=world_size)
        fixed = {"views": views, "view_seed": seed if view_seed is None else view_seed} if train else {}
        if isinstance(split, Listing):
            return StreamLoader(
                split, plan, device=device, train=train, num_workers=num_workers, decode=decode, **fixed
            )
        # A 32 x 32 image's border of 4, in proportion. The digits are too small and too even to gain from either.
        augment = train and dataset != "digits"
        padding = split.image_shape[1] // 8 if augment else 0
        return ArrayLoader(split, plan, device=device, padding=padding, flip=augment, **fixed)

    shape = (3, 224, 224) if isinstance(splits.train, Listing) else splits.train.image_shape
    return Loaders(loader(splits.train, True), loader(splits.test, False), splits.num_classes, shape)
