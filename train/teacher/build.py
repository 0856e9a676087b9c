"""The teacher that a run asked for, the cache filled first where it has to be."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Loader, Loaders
from ..data.files import file_lock
from .cache import CachedTeacher, CacheKey, CacheRejected, others_in, write_cache
from .frozen import FrozenTeacher

_FILL_BATCH = 256


def build_teacher(
    model: nn.Module,
    loaders: Loaders,
    *,
    weights_digest: str,
    views: int,
    cache_dir: Path,
    amp_dtype: torch.dtype | None = None,
    compile: bool = False,
    channels_last: bool = True,
) -> FrozenTeacher | CachedTeacher:
    """`model`, frozen, on the loaders' device; with `views` (the loaders' own) as a cache in `cache_dir`.

    A cache that fits is reused. One that does not is named with the reason, never used, and a new one is built. Any
    number of ranks and of runs may ask for the same cache at once: one builds it, the others wait for it.

    Args:
        model: the teacher, its weights loaded; frozen in place.
        loaders: `build_loaders`' with the same `views`.
        weights_digest: a digest of those weights, the checkpoint file's or `state_digest(model)`.
        views: 0 to run the teacher at every step, M to run it once on M views of every training image.
        cache_dir: the folder of the caches.
        amp_dtype: autocast the teacher to this dtype.
        compile: run the teacher through torch.compile.
        channels_last: run the teacher in channels_last.
    """
    loader = loaders.train
    if views != loader.views:
        raise ValueError(f"build_teacher: expected the loaders' number of views, {loader.views}, got {views}")
    teacher = FrozenTeacher(
        model.to(loader.device), amp_dtype=amp_dtype, compile=compile, channels_last=channels_last,
        weights_digest=weights_digest,
    )  # fmt: skip
    if not views:
        return teacher
    key = CacheKey(
        weights_digest=weights_digest,
        architecture=_architecture(model),
        data_digest=loader.data_digest(),
        augmentation=loader.augmentation,
        view_seed=loader.view_seed,
        views=views,
        samples=loader.samples,
        num_classes=loaders.num_classes,
        amp_dtype=str(amp_dtype).removeprefix("torch."),
    )
    cache_dir = Path(cache_dir).expanduser()
    path = key.path(cache_dir)
    # First without the lock, which would have the ranks check a file of gigabytes one after the other.
    cached = _open(path, key, warn=False)
    if cached is None:
        with file_lock(path):
            cached = _open(path, key, warn=True)  # another process may have built it in the meantime
            if cached is None:
                _check_space(cache_dir, key)
                write_cache(path, key, _all_logits(teacher, loader))
    return cached or CachedTeacher(path, key)


def _open(path: Path, key: CacheKey, *, warn: bool) -> CachedTeacher | None:
    """The cache at `path`; None where there is none of this key, which `warn` says where others are."""
    reason = None
    if path.exists():
        try:
            return CachedTeacher(path, key)
        except CacheRejected as error:
            reason = f"{error}. Not used: it is built again"
    elif others := others_in(path.parent, key):
        reason = f"teacher caches that do not fit this run are not used: {', '.join(others)}"
    if warn and reason:
        warnings.warn(reason, stacklevel=3)
    return None


def _all_logits(teacher: FrozenTeacher, loader: Loader) -> Iterator[Tensor]:
    total = loader.views * loader.samples
    # disable=None: no bar where nobody watches, as in a log file.
    with tqdm(total=total, desc="teacher cache", unit="image", unit_scale=True, disable=None) as bar:
        for view in range(loader.views):
            for batch in loader.view_batches(view, _FILL_BATCH):
                yield teacher.logits(batch.images)
                bar.update(len(batch.labels))


def _architecture(model: nn.Module) -> str:
    """The network's class and a digest of its structure: of ResNets, resnet20 and resnet56 are both instances."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    return f"{type(model).__name__}-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}"


def _check_space(folder: Path, key: CacheKey) -> None:
    free = shutil.disk_usage(folder).free
    if key.nbytes > free:
        raise OSError(
            f"teacher cache: expected {key.nbytes / 2**30:.1f} GiB free in {folder} for {key.views} views of "
            f"{key.samples} images, got {free / 2**30:.1f} GiB; use fewer views or another folder"
        )
