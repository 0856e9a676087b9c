"""Where each data set's images come from, and what to do when they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from .array import ArrayData
from .files import file_lock
from .folder import Listing, decode_all, find_split

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# Images up to this side are kept in memory; a million of them at 64 x 64 take 12 GB, at 224 x 224 150 GB.
SMALL = 64
# The digits' split is the same whatever the run's seed: a teacher's test images are no student's training images.
_DIGITS_TRAIN, _DIGITS_SEED = 1297, 0


class Splits(NamedTuple):
    """A data set's two halves, in memory or as listings of files."""

    train: ArrayData | Listing
    test: ArrayData | Listing
    num_classes: int


def digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits, 1 x 8 x 8, values 0 to 16: 1,297 to train, 500 to test."""
    from sklearn.datasets import load_digits  # here: a second of import that no other data set needs

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(-1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_DIGITS_SEED))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    mean, std = _statistics(images[train], peak=16.0)
    halves = (ArrayData(images[part], labels[part], mean, std, peak=16.0) for part in (train, test))
    return Splits(*halves, num_classes=10)


def cifar100(root: Path, num_workers: int) -> Splits:
    """CIFAR-100 in `root`: an ImageFolder tree where there is one, torchvision's files or download otherwise."""
    return _cifar("cifar100", CIFAR100, root, num_workers, CIFAR_MEAN, CIFAR_STD)


def cifar10(root: Path, num_workers: int) -> Splits:
    """CIFAR-10, found as CIFAR-100 is."""
    return _cifar("cifar10", CIFAR10, root, num_workers, CIFAR10_MEAN, CIFAR10_STD)


def _cifar(
    name: str, kind: type[CIFAR10], root: Path, num_workers: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Splits:
    if find_split(root, ("train",)):
        train, test = _listings(name, root, ("test", "val"))
        return _in_memory(train, test, num_workers, mean, std)
    try:
        halves = [kind(root, train=train) for train in (True, False)]
    except RuntimeError:  # not there, or not intact
        try:
            with file_lock(root / kind.base_folder):  # one rank downloads, the others then find it done
                halves = [kind(root, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:  # no network; a folder that cannot be written; a damaged download
            files = {"name": name, "folder": kind.base_folder, "archive": kind.filename, "url": kind.url}
            raise FileNotFoundError(_CIFAR_MISSING.format(root=root, error=error, **files)) from error
    train, test = (ArrayData(torch.from_numpy(half.data), torch.tensor(half.targets), mean, std) for half in halves)
    return Splits(train, test, num_classes=len(halves[0].classes))


def tiny_imagenet(root: Path, num_workers: int) -> Splits:
    """tiny-ImageNet, 64 x 64, in `root`: its archive as it comes, or with val/ in a folder for each class."""
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return _in_memory(*_listings("tiny_imagenet", root, ("val", "test")), num_workers)
    train, test = Listing(root / "train"), Listing(root / "val")
    # As it comes, all images of val/ lie in one folder, and a line of the file has an image's name, class and box.
    rows = (line.split("\t") for line in annotations.read_text().splitlines())
    label_of = {name: train.classes.index(label) for name, label, *_ in rows if label in train.classes}
    names = [test.path(index).name for index in range(len(test))]
    if unknown := [name for name in names if name not in label_of]:
        raise ValueError(
            f"tiny_imagenet: expected a class of train/ for each image in {annotations}, got none for {unknown[0]}"
        )
    test.labels, test.classes = torch.tensor([label_of[name] for name in names]), train.classes
    return _in_memory(train, test, num_workers)


def imagenet(root: Path) -> Splits:
    """ImageNet, or a tree like it: decoded as it is needed. The labels are in val/; ImageNet's test/ has none."""
    train, test = _listings("imagenet", root, ("val", "test"))
    return Splits(train, test, num_classes=len(train.classes))


def imagefolder(root: Path, num_workers: int) -> Splits:
    """Any ImageFolder tree: in memory where its images are small, normalised by their own mean and deviation."""
    train, test = _listings("imagefolder", root, ("test", "val"))
    if max(train.read(0).shape[1:]) > SMALL:
        return Splits(train, test, num_classes=len(train.classes))
    return _in_memory(train, test, num_workers)


def _listings(dataset: str, root: Path, test_names: tuple[str, ...]) -> tuple[Listing, Listing]:
    folders = find_split(root, ("train",)), find_split(root, test_names)
    if None in folders:
        missing = "train" if folders[0] is None else " or ".join(test_names)
        raise FileNotFoundError(_TREE_MISSING.format(dataset=dataset, root=root, missing=missing, test=test_names[0]))
    train, test = (Listing(folder) for folder in folders)
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"{dataset}: expected the same class folders in {train.root} and {test.root}, "
            f"but {len(differ)} are in one alone: {', '.join(differ[:5])}"
        )
    return train, test


def _in_memory(
    train: Listing,
    test: Listing,
    num_workers: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Splits:
    images = [decode_all(listing, num_workers) for listing in (train, test)]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ValueError(
            f"expected images of one size in {train.root} and {test.root}, "
            f"got {tuple(images[0].shape[1:3])} and {tuple(images[1].shape[1:3])} (height, width)"
        )
    if mean is None or std is None:
        mean, std = _statistics(images[0], peak=255.0)
    halves = (ArrayData(x, half.labels, mean, std) for x, half in zip(images, (train, test), strict=True))
    return Splits(*halves, num_classes=len(train.classes))


def _statistics(images: torch.Tensor, peak: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 ``[N, H, W, C]``, from exact counts of its 256 values."""
    values = torch.arange(256, dtype=torch.float64) / peak
    means, stds = [], []
    for channel in images.unbind(-1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(round(mean.item(), 4))
        # A channel of one value has no deviation to divide by.
        stds.append(round((share * (values - mean) ** 2).sum().sqrt().item(), 4) or 1.0)
    return tuple(means), tuple(stds)


_CIFAR_MISSING = """{name}: no data in {root}, and the download failed: {error}
Provide one of
  {root}/{folder}/   the official files; on a machine with network:
      curl -O {url} && tar xzf {archive} -C {root}
  {root}/train/<class>/*.png and {root}/test/<class>/*.png   an ImageFolder tree of 32 x 32 images"""

_TREE_MISSING = """{dataset}: expected the folder {missing} in {root}, which has none
Provide an ImageFolder tree, one folder of images for each class:
  {root}/train/<class>/*
  {root}/{test}/<class>/*"""
