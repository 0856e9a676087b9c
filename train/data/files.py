"""Files that several processes share: written whole or not at all, built by one process while the others wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, so there two processes may both build; the rename still keeps files whole
    fcntl = None


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold `path`.lock; wait for it without a limit, where a collective would time out on a long build.

    The kernel drops the lock with its holder, so a killed process leaves nothing to clean up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "ab") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` at the end of the block, on disk by then, and not before.

    Call it under `file_lock(path)`: what a killed process left under the temporary name is overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())  # a rename may reach the disk before the data does
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
