"""A teacher's logits in one file: what it holds, how it is read, and why it is refused.

The file is one line that names the format, the key as JSON, spaces up to `_HEADER` bytes, and then float16
``[views, samples, classes]``. It has its name only once it is whole (`atomic_file`), and everything in it is checked
before a number of it is used: the key, field by field, the length, and a checksum.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.files import atomic_file

_MAGIC = b"sortkd teacher logits 1\n"
_HEADER = 4096  # a page, so that the logits start on one
_SUFFIX = ".logits"
# Half precision by what it costs: a logit of 20 is off by at most 0.008. bfloat16 would be off by 0.06.
_DTYPE = np.dtype("<f2")


class CacheRejected(ValueError):
    """A cache file that must not be used; the message says why."""


@dataclass(frozen=True)
class CacheKey:
    """All that decides what the logits are. A cache is used only by a run with the very same key.

    (torch.compile and channels_last are left out: they change less than half precision rounds away.)
    """

    weights_digest: str
    architecture: str
    data_digest: str
    augmentation: dict[str, object]
    view_seed: int
    views: int
    samples: int
    num_classes: int
    amp_dtype: str
    dtype: str = _DTYPE.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(views, samples, num_classes)."""
        return self.views, self.samples, self.num_classes

    @property
    def nbytes(self) -> int:
        """Size of the logits."""
        return self.views * self.samples * self.num_classes * _DTYPE.itemsize

    def path(self, folder: Path) -> Path:
        """The file of this key in `folder`: the architecture to read, a digest of the key to tell keys apart."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return folder / f"{self.architecture}-{digest}{_SUFFIX}"

    def difference(self, other: dict[str, object]) -> str:
        """In words, what `other`, the key that a file holds, has otherwise; empty where nothing."""
        own = json.loads(json.dumps(asdict(self)))
        names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        return "; ".join(f"{name}: expected {own.get(name)}, got {other.get(name)}" for name in names)


class CachedTeacher:
    """A teacher that is not run: the logits of M fixed views of every image, in a memory-mapped file."""

    def __init__(self, path: Path, key: CacheKey) -> None:
        """Open the file at `path`, which must hold the logits of `key`; `CacheRejected` says what is wrong with it."""
        self.path, self.key, self.weights_digest = path, key, key.weights_digest
        found, checksum = _read_header(path)
        if difference := key.difference(found):
            raise CacheRejected(f"teacher cache {path} is of another run: {difference}")
        size, expected = path.stat().st_size, _HEADER + key.nbytes
        if size != expected:
            raise CacheRejected(f"teacher cache {path} is damaged: expected {expected} bytes, got {size}")
        # As a plain array: the subclass would wrap every batch that is read from it.
        self._logits = np.asarray(np.memmap(path, dtype=_DTYPE, mode="r", offset=_HEADER, shape=key.shape))
        if (got := _checksum(self._logits)) != checksum:
            raise CacheRejected(f"teacher cache {path} is damaged: expected checksum {checksum:08x}, got {got:08x}")

    def rows(self, view: Tensor, index: Tensor) -> Tensor:
        """float16 logits ``[B, num_classes]`` of the images `index` in the views `view`, all on the host."""
        return torch.from_numpy(self._logits[view.numpy(), index.numpy()])


def write_cache(path: Path, key: CacheKey, blocks: Iterable[Tensor]) -> None:
    """Write the logits `blocks`, ``[*, num_classes]`` each, in the order of views and then images."""
    checksum = rows = 0
    with atomic_file(path) as handle:
        handle.write(b" " * _HEADER)
        for block in blocks:
            if block.shape[1:] != (key.num_classes,):
                raise ValueError(
                    f"teacher cache: expected logits of {key.num_classes} classes, as the data set has, "
                    f"got {tuple(block.shape)} from {key.architecture}"
                )
            half = block.to(torch.float16)
            if not half.isfinite().all():
                raise ValueError(
                    f"teacher cache: expected finite logits that float16 holds (up to 65504), got "
                    f"{block.abs().max().item():g} from {key.architecture}; train without TEACHER.CACHE_VIEWS"
                )
            data = half.cpu().contiguous().numpy().astype(_DTYPE, copy=False)
            checksum = zlib.crc32(data, checksum)
            rows += len(data)
            handle.write(data)
        if rows != key.views * key.samples:
            raise ValueError(f"teacher cache: expected logits of {key.views * key.samples} images, got {rows}")
        header = _MAGIC + json.dumps({"key": asdict(key), "checksum": checksum}).encode()
        if len(header) > _HEADER:
            raise ValueError(f"teacher cache: expected a key of at most {_HEADER} bytes, got {len(header)}")
        handle.seek(0)
        handle.write(header)


def others_in(folder: Path, key: CacheKey) -> list[str]:
    """Of each cache in `folder` of the same architecture but for another key: its name, and what differs."""
    found = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            other, _ = _read_header(path)
        except CacheRejected as error:
            found.append(str(error))
            continue
        if other.get("architecture") == key.architecture and (difference := key.difference(other)):
            found.append(f"{path.name} ({difference})")
    return found


def _read_header(path: Path) -> tuple[dict[str, object], int]:
    """The key that the file holds, and the checksum of its logits."""
    with open(path, "rb") as handle:
        header = handle.read(_HEADER)
    if not header.startswith(_MAGIC):
        raise CacheRejected(f"{path} is not a teacher cache: it does not start with {_MAGIC.decode().strip()!r}")
    try:
        fields = json.loads(header[len(_MAGIC) :])
        return dict(fields["key"]), int(fields["checksum"])
    except (ValueError, KeyError, TypeError) as error:
        raise CacheRejected(f"teacher cache {path} is damaged: its header cannot be read ({error})") from error


def _checksum(logits: np.ndarray) -> int:
    checksum = 0
    for view in logits:
        checksum = zlib.crc32(view, checksum)
    return checksum
