"""Several runs in one process, a step of each in turn: on a GPU, which one run of small networks cannot fill."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .checkpoint import generator_states, set_generator_states
from .graphs import run_stream

T = TypeVar("T")


class Turn:
    """What a run has for itself in a process that it shares: the random generators and, on a GPU, a stream.

    Runs on one device at the same time have a `slot` each.
    """

    def __init__(self, device: torch.device, slot: int = 0) -> None:
        self._host: dict[str, Any] | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = run_stream(device, slot)
            self._generator = torch.cuda.default_generators[device.index]
            self._own = self._generator.clone_state()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While it lasts, the process draws from this run's generators and its kernels go to this run's stream."""
        if self._host is not None:
            set_generator_states(self._host)
        if self._stream is None:
            yield
            self._host = generator_states()
            return
        # A captured graph draws from the state that was the generator's at its capture: so the states change places,
        # and none is written into another's.
        others = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._own)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._own = self._generator.graphsafe_get_state()
            self._generator.graphsafe_set_state(others)
            self._host = generator_states()


def finish(steps: Generator[None, None, T]) -> T:
    """All steps of a run, and what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def take_turns(runs: Sequence[Generator[None, None, T]], device: torch.device) -> list[T | Exception]:
    """A step of each run in turn to the end of all; what each returns, or the exception that ended it, in order."""
    ends: dict[int, T | Exception] = {}
    turns = [Turn(device, slot) for slot in range(len(runs))]
    try:
        while len(ends) < len(runs):
            for slot, (steps, turn) in enumerate(zip(runs, turns, strict=True)):
                if slot in ends:
                    continue
                try:
                    with turn.taken():
                        next(steps)
                except StopIteration as done:
                    ends[slot] = done.value
                except Exception as error:  # its own end, and not the others'
                    ends[slot] = error
                    reason = (str(error).splitlines() or [""])[0]
                    warnings.warn(
                        f"run {slot + 1} of {len(runs)} ended with {type(error).__name__}: {reason}; the others go on",
                        stacklevel=2,
                    )
    finally:
        for steps in runs:
            steps.close()
    return [ends[slot] for slot in range(len(runs))]
