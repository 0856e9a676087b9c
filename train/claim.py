"""One process a run folder: two would write each other's checkpoints over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .config import ConfigError

try:
    import fcntl
except ImportError:  # Windows: no locks, and so no protection
    fcntl = None

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the run folder `folder`, made where it is missing, against other processes; `ConfigError` where one has it.

    The kernel drops the lock with its holder, so a killed run can be resumed at once. A folder that is made here and in
    which nothing was written by the end is removed again.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(f"LOG.PREFIX: expected a folder that can be written, got {folder}: {error}") from error
    with handle:
        try:
            if fcntl is not None:
                # Not flock: the data loader's workers, which outlive a killed run by seconds, would share its lock.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"EXPERIMENT.NAME: expected a folder that no other run uses, got {folder}, in which another process is "
                "training; wait for it, or choose another EXPERIMENT.NAME or EXPERIMENT.SEED"
            ) from None
        try:
            yield
        finally:
            if folder in made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                for path in made:
                    with suppress(OSError):  # not empty
                        path.rmdir()
