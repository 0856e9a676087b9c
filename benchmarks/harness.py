"""How this package measures: every provider in turn, every call a sample, medians with quartiles, memory, the machine.

A provider is one way to compute a result. Providers of a case are interleaved, so that a change of the machine's speed
meets all of them, and ratios are taken between medians of one run only.
"""

from __future__ import annotations

import csv
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PHASES = ("forward", "backward", "both")
SLICE_S = 0.04  # what a provider's turn lasts at least, so that short calls run in warm caches
MAX_CALLS = 200

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler announces itself at each start otherwise


@dataclass
class Provider:
    """One way to compute a result, ready to be called.

    Attributes:
        name: the column's name, unique in its case.
        call: computes the result: a scalar loss where there are leaves.
        leaves: tensors that receive a gradient; empty where there is no backward pass.
        nbytes: what the work must move: the byte model, the same for every provider of the same work.
        elements: N * C, the unit of extra memory.
        check: compares a result and its leaves' gradients with the truth and raises ``AssertionError``.
        prepare: runs untimed before each call.
        roof, chain: the names of the providers that this one is held against: the copy of the same bytes, and the same
            work in eager PyTorch.
        captured: whether a CUDA graph can be made of it.
    """

    name: str
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    nbytes: int = 0
    elements: int = 1
    check: Callable[[Tensor], None] | None = None
    prepare: Callable[[], None] | None = None
    roof: str = "roof"
    chain: str = ""
    captured: bool = True

    def run(self) -> Tensor:
        """One untimed call, with its backward pass if grad is enabled; the gradients stay for the caller to look at."""
        self.release()
        if self.prepare:
            self.prepare()
        result = self.call()
        if self.leaves and torch.is_grad_enabled():
            result.backward()
        return result

    def release(self) -> None:
        """Drop the gradients, as ``zero_grad(set_to_none=True)`` does between training steps."""
        for leaf in self.leaves:
            leaf.grad = None


class Spread(NamedTuple):
    """A median and its quartiles, in seconds."""

    median: float
    q1: float
    q3: float
    runs: int

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """The spread of ``samples``; of a single one, that one."""
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(median, q1, q3, len(samples))


def mark(device: torch.device) -> float:
    """A point in time, after all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class _Samples:
    """The calls of one provider so far."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)

    def spreads(self, has_backward: bool) -> dict[str, Spread]:
        phases = PHASES if has_backward else ("both",)
        return {phase: Spread.of(getattr(self, phase)) for phase in phases}


def measure(
    providers: Sequence[Provider], budget_s: float, device: torch.device, min_rounds: int = 5
) -> dict[str, dict[str, Spread]]:
    """Time all providers in rounds until the budget is spent, at least ``min_rounds`` of them.

    What a call leaves behind (result, gradient) is released outside the timed region, for every provider alike.

    Returns:
        ``{provider name: {phase: Spread}}``; a provider without leaves has the phase ``"both"`` only.
    """
    samples = {p.name: _Samples() for p in providers}
    order = list(providers)
    shuffle = random.Random(0).shuffle  # no provider always follows the same one
    deadline = time.perf_counter() + budget_s
    rounds = 0
    gc.collect()
    gc.disable()
    try:
        while rounds < min_rounds or time.perf_counter() < deadline:
            shuffle(order)
            for p in order:
                _turn(p, samples[p.name], device)
            rounds += 1
    finally:
        gc.enable()
    return {p.name: samples[p.name].spreads(bool(p.leaves)) for p in providers}


def _turn(provider: Provider, samples: _Samples, device: torch.device) -> None:
    calls = min(MAX_CALLS, 1 + int(SLICE_S / min(samples.both))) if samples.both else 1
    if calls > 1:
        provider.run()  # the caches and the allocator still hold the previous provider's memory
        provider.release()
    marks = []
    for _ in range(calls):
        if provider.prepare:
            provider.prepare()
        start = mark(device)
        result = provider.call()
        middle = mark(device)
        if provider.leaves:
            result.backward()
        marks.append((start, middle, mark(device)))
        del result
        provider.release()
    for start, middle, end in marks:
        samples.forward.append(middle - start)
        samples.backward.append(end - middle)
        samples.both.append(end - start)


def peak_memory(provider: Provider, device: torch.device) -> float:
    """The most memory alive at once beyond the inputs, results and gradients included, in units of N * C elements.

    Under ``torch.no_grad()`` without the backward pass. From the allocator's own record: on the CPU the profiler's
    allocation events, on CUDA ``max_memory_allocated``.
    """
    provider.release()  # the last call's gradient, which `run` frees, is no part of what is there before
    unit = provider.elements * (provider.leaves[0] if provider.leaves else provider.run()).element_size()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = provider.run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            result = provider.run()
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        alive = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
    del result
    provider.release()
    return peak / unit


def busy() -> str:
    """A warning where other processes hold the processor, or an empty string: timings taken then say little."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = os.cpu_count() or 1
    return f"the machine was busy at the start, load {load:.1f} on {cores} cores" if load > cores / 2 else ""


def machine(device: torch.device, build: dict[str, object]) -> dict[str, str]:
    """What the figures depend on; ``build`` is ``sortkd_kernels.build_info()``."""
    facts = {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "instruction set": f"{build.get('cpu_capability', 'extension not built')}"
        f" (PyTorch: {torch.backends.cpu.get_cpu_capability().lower()})",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        "load": busy() or "idle at the start",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts = {"GPU": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"} | facts
    return facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def write_csv(path: Path, kind: type, rows: Iterable[Any]) -> None:
    """Rows that are dataclasses of one ``kind``, a column a field, floats to five digits; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def table(heads: list[str], lines: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(x)} |" for x in (heads, ["---"] * len(heads), *lines)]


def duration(us: float) -> str:
    """Microseconds in words, three digits."""
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999.5e3 else f"{us / 1e6:.2f} s"


def ratio(value: float | None) -> str:
    """A ratio in three digits; empty for None."""
    return "" if value is None else f"{value:.0f}" if value >= 20 else f"{value:.2f}"
