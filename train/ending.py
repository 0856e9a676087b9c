"""How a command ends: errors that a user can mend in their words alone, a signal with the place where to go on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .checkpoint import DamagedCheckpoint
from .config import ConfigError
from .guard import NonFiniteLoss

MENDABLE = (ConfigError, DamagedCheckpoint, NonFiniteLoss, OSError)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 5  # seconds


@contextmanager
def in_words(where_to_go_on: Callable[[], str]) -> Iterator[None]:
    """End the process with a message in place of a traceback where the block is stopped or raises what can be mended.

    SIGTERM and ctrl-C unwind the block like an exception, so that half-written files go, and exit with 143 and 130.
    """
    received: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now - received[-1][1] < _PATIENCE:
            return  # torchrun and batch systems send it twice, and the second would interrupt the clearing up
        received.append((number, now))
        # A signal to the whole process group ends the data loader's workers too, of which it would make an error.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, lambda *_: None)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may
        before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except BaseException as error:
        # Libraries make an error of their own of what interrupts them, as torch.save does: what came first counts.
        if received or isinstance(error, KeyboardInterrupt):
            number = received[0][0] if received else int(signal.SIGINT)
            if _rank() == 0:
                print(f"stopped by {signal.Signals(number).name}; {where_to_go_on()}", file=sys.stderr)
            sys.exit(128 + number)
        if isinstance(error, MENDABLE):
            _fail(f"{type(error).__name__}: {error}")
        raise


def _fail(message: str) -> None:
    """Exit with `message`; under torchrun it is left for torchrun to show, once and after all that it says itself."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        sys.exit(message)
    if _rank() != 0:
        # Nearly always the main rank says the same, and torchrun then ends this one: it speaks for itself otherwise.
        time.sleep(30)
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(file).write_text(json.dumps(content))
    sys.exit(1)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
