"""Steps as CUDA graphs: what the host would launch kernel by kernel is captured once and replayed as one.

The rules are those of torch's documentation ("CUDA Graphs", "Constraints"): a captured function reads and writes
memory that stays where it is, waits for nothing, and has run before on the stream that captures it.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Calls that run eagerly before one is captured. They are steps of the run like any other, so nothing has to be undone:
# cuDNN chooses its algorithms in them, and the libraries allocate their workspaces for this stream, in ordinary memory.
# A workspace that was first needed during a capture would lie in the graph's pool and be freed with it, while the
# library goes on using it for the next graph on that stream.
_EAGER_CALLS = 3
# Graphs that are kept: of a whole and of a partial batch, before and after a change.
_KEPT = 4


class Graphed:
    """A function of constants, captured on a CUDA device once for each choice of constants and replayed from then on.

    Elsewhere, and where a capture fails, which is said in words, it is called: the function is the same.
    """

    def __init__(self, function: Callable[..., None], device: torch.device, *, enabled: bool, name: str) -> None:
        self.function, self.name = function, name
        self.enabled = enabled and device.type == "cuda"
        self._device = device
        self._calls: dict[tuple[object, ...], int] = {}
        self._graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph] = {}
        # One pool for all graphs of a function: they run one after the other, and nothing in it outlives a replay.
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def __call__(self, *constants: object) -> None:
        """Call the function, or replay it."""
        if not self.enabled:
            self.function(*constants)
        elif constants in self._graphs:
            self._graphs[constants].replay()
        elif self._calls.setdefault(constants, 0) < _EAGER_CALLS:
            self._calls[constants] += 1
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                self.function(*constants)
        else:
            self._capture(constants)
            self(*constants)

    def _capture(self, constants: tuple[object, ...]) -> None:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self._device.index]
        before = generator.clone_state()
        try:
            # thread_local: the data loader's thread that pins memory may do so meanwhile.
            stream = torch.cuda.current_stream(self._device)
            with _no_collection(), torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                self.function(*constants)
        except RuntimeError as error:
            # The generator that a failed capture leaves refuses to draw.
            generator.graphsafe_set_state(before)
            self.enabled = False
            self._graphs.clear()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"SOLVER.GRAPH: the {self.name} cannot be captured as a CUDA graph and runs eagerly: {reason}",
                stacklevel=4,
            )
            return
        if len(self._graphs) == _KEPT:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[constants] = graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Free what Python holds in cycles, as the graphs of a run that is over, now and not in the middle of a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def run_stream(device: torch.device, slot: int) -> torch.cuda.Stream:
    """The stream of the `slot`-th of the runs at a time: libraries keep a workspace for each stream, for ever."""
    return torch.cuda.Stream(device)
