"""ImageFolder trees: the listing of a split, its images from disk, and small images decoded once into memory."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision has announced that it will leave decoding to TorchCodec; PIL is slower, and stays
    ImageReadMode = decode_jpeg = None

# How whole files of these kinds begin and end; of any other file, decoding it tells.
_WHOLE = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"))


class _Visible(ImageFolder):
    """An ImageFolder without what is hidden: `.ipynb_checkpoints` is no class, and `._1.jpg` no image."""

    def __init__(self, root: str) -> None:
        self.hidden: set[str] = set()
        super().__init__(root, is_valid_file=self._is_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The folders that are not hidden, in alphabetical order, and their numbers."""
        folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        self.hidden |= {name for name in folders if name.startswith(".")}
        classes = [name for name in folders if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"expected a folder of images for each class in {directory}, got none")
        return classes, {name: number for number, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        if f"{os.sep}." in path[len(os.fspath(self.root)) :]:  # plain strings: a million of them
            self.hidden.add(os.path.basename(path))
            return False
        return is_image_file(path)


class Listing:
    """The images of ``root/<class>/*``, classes in alphabetical order, as torchvision's ImageFolder lists them.

    Hidden folders and files are skipped with a warning.
    """

    def __init__(self, root: Path) -> None:
        folder = _Visible(os.fspath(root))
        if folder.hidden:
            names = ", ".join(sorted(folder.hidden)[:5])
            warnings.warn(f"{root}: hidden folders and files are skipped: {names}", stacklevel=2)
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

    def file(self, index: int) -> Tensor:
        """Image `index` as it lies on the disk: uint8 ``[bytes]``."""
        return torch.from_numpy(np.fromfile(self.path(index), np.uint8))

    def read(self, index: int) -> Tensor:
        """Image `index`, decoded, RGB: uint8 ``[3, H, W]``, in memory a pixel's three values together."""
        path = self.path(index)
        try:
            if decode_jpeg is not None and path.suffix.lower() in (".jpg", ".jpeg"):
                # The same libjpeg-turbo as PIL's, so the same pixels, but written once, where PIL copies them twice.
                # What it refuses is left to PIL: other formats under that name, and the words for a damaged file.
                with suppress(RuntimeError):
                    return decode_jpeg(self.file(index), ImageReadMode.RGB)
            with Image.open(path) as image:
                return torch.from_numpy(np.array(_eight_bits(image).convert("RGB"))).permute(2, 0, 1)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # PIL's, for a broken PNG the third
            raise ValueError(f"cannot read the image {path}: {error}; remove it or fetch it again") from error

    def check(self, indices: Iterable[int], threads: int) -> None:
        """Raise `ValueError` for the first of these images that is cut off or not an image.

        A file that begins and ends as its format asks is taken for whole: 20 us each, where decoding takes 10 ms.
        """
        with ThreadPoolExecutor(max(1, threads)) as pool:  # threads wait for a disk together
            for _ in pool.map(self._check, indices):
                pass

    def _check(self, index: int) -> None:
        with self.path(index).open("rb") as file:
            begin = file.read(8)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8))
            end = file.read()
        if not any(begin.startswith(first) and end.endswith(last) for first, last in _WHOLE):
            self.read(index)

    def digest(self) -> str:
        """A digest of the images' names, labels and sizes in bytes.

        It stands for the images' contents, which for a large tree would take longer to read than to train on.
        """
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            size = self.path(index).stat().st_size
            digest.update(repr((bytes(self._paths[index]), label, size)).encode())
        return digest.hexdigest()[:32]


def _eight_bits(image: Image.Image) -> Image.Image:
    """`image` with 16 bits a pixel brought to 8, white staying white: PIL's own conversion clips at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # some versions of PIL: I
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a pixel, got PIL's mode {image.mode}, whose white is not known")
    return image


def last_line(error: Exception) -> str:
    """What was raised, without the traceback that a DataLoader puts before it for a worker."""
    return str(error).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")


def find_split(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the folders `names` in `root` that is there."""
    return next((root / name for name in names if (root / name).is_dir()), None)


class _SameSize(Dataset[Tensor]):
    """Images of one size, as uint8 ``[H, W, 3]``."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.size = listing.read(0).shape[1:]

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> Tensor:
        image = self.listing.read(index)
        if image.shape[1:] != self.size:
            (height, width), (rows, columns) = self.size, image.shape[1:]
            raise ValueError(
                f"expected every image of {self.listing.root} of the first one's size, {width} x "
                f"{height}, got {columns} x {rows} in {self.listing.path(index)}"
            )
        return image.permute(1, 2, 0)


def decode_all(listing: Listing, num_workers: int) -> Tensor:
    """All images of `listing`, which are small and of one size: uint8 ``[N, H, W, 3]``.

    Decoded anew at every start: 50,000 images take 3 s in two workers, less than keeping a second copy on disk in
    step with the tree is worth.
    """
    workers = min(num_workers, len(listing) // 1000)  # starting one costs more than decoding a few hundred images
    batches = DataLoader(_SameSize(listing), batch_size=256, num_workers=workers, generator=torch.Generator())
    try:
        return torch.cat([batch.clone() for batch in batches])  # clones: a worker's batch holds a shared-memory handle
    except ValueError as error:
        raise ValueError(last_line(error)) from error
