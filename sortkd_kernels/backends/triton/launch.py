"""The launch choices of the Triton kernels, each with its reason. Nothing else in the backend holds such a number.

No GPU has timed them: they follow from the register file and from what the compiled kernels show (gpu_static.md).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Labels outside the classes are asserted on the device, as F.cross_entropy does. Triton's debug mode would also check
# every integer addition for overflow, which the kernels do not want.
DEVICE_ASSERT = {"debug": True, "sanitize_overflow": False}

# The most classes of a row held in registers. Of 16384 both sides are half of an SM's register file, and the rest is
# too little for their exponentials: sm_80 and sm_100 spill. Doubles take twice the room, and so do the further sums of
# a z-score or of a temperature's gradient.
ON_CHIP_CLASSES = {torch.float32: 8192, torch.float64: 4096}

# A rank that the row's own program settles, one reduction a step. Trained teachers stay below it on nearly all rows.
SHALLOW_RANK = 8

# A sorted run: 55 compare stages. The network of 4096 keys has 78, takes four times the code and three seconds to
# compile, and merging is as cheap. Small runs, which most are, have a network of 21 stages. The interpreter pays
# milliseconds of Python for each stage.
RUN = 32 if INTERPRETED else 1024
SMALL_RUN = 16 if INTERPRETED else 64

# Classes that a streaming program takes at a time: 8 values a lane with 8 warps, or 4 doubles.
CLASS_BLOCK = 2048

# Rows that a block of the small kernels takes at a time.
ROW_BLOCK = 1024

# Rows of one launch where each has a run of scratch to itself: 32 MiB of keys.
ROWS_A_LAUNCH = 4096

# Scratch of a launch whose programs hold a whole row's keys: a row on each of 132 SMs up to C = 65536.
SCRATCH_BYTES = 128 << 20


class Tile(NamedTuple):
    """Rows and (padded) classes of a program of `sort_kd_tile`, and its options."""

    rows: int
    classes: int
    options: dict[str, int]


class Stream(NamedTuple):
    """A launch of `sort_kd_stream`: programs, keys for each of them in so many buffers, block, run, options."""

    programs: int
    capacity: int
    buffers: int
    block: int
    run: int
    stride_rows: bool
    options: dict[str, int]


class Span(NamedTuple):
    """How row terms are summed: by ``programs`` programs of ``span`` rows each, then by one."""

    programs: int
    span: int


def on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run on the device of the first argument: Triton launches on the current one, whatever its tensors are on."""

    @functools.wraps(function)
    def wrapper(first: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *args, **keywords)

    return wrapper


def on_chip(C: int, work: torch.dtype, moments: bool) -> bool:
    """Whether `sort_kd_tile` takes rows of C classes."""
    return ON_CHIP_CLASSES[work] // (2 if moments else 1) >= C


def tile(C: int, neighbours: bool, work: torch.dtype, moments: bool) -> Tile:
    """The tile of `sort_kd_tile`.

    A warp takes 1024 values: every lane does the arithmetic of a row's end, so the fewer lanes a row has, the fewer
    instructions; 32 values a lane of both sides leave room for the exponentials. Doubles take twice the registers, and
    so do the further sums, each with half the values. Of short rows a warp takes a quarter of that, as a lane then
    holds the scalars of several rows too. Where rows are neighbours in memory in place of classes (``[N, C, H, W]``), a
    tile needs enough of them, or each 32-byte sector is read for one value: 32 rows give each lane of a warp its own.
    """
    values = 1024 // (2 if work == torch.float64 else 1) // (2 if moments else 1)
    classes = max(16, triton.next_power_of_2(C))
    rows = max(1, values // 4 // classes)
    if neighbours:
        rows = max(rows, min(32, ON_CHIP_CLASSES[work] // (2 if moments else 1) // classes))
    options = {"num_warps": max(1, min(16, rows * classes // values))}
    if work == torch.float64 and torch.version.hip is None:
        # Without a limit of our own the compiler sets itself one of 128 on sm_100 and spills; 8 warps may have 255.
        options["maxnreg"] = 255
    return Tile(rows, classes, options)


def stream(N: int, C: int, work: torch.dtype, every_rank: bool, top_k: bool, device: torch.device) -> Stream:
    """A launch of `sort_kd_stream`; with ``every_rank`` its programs have room for all classes of a row."""
    values = 32 * (4 if work == torch.float64 else 8)
    block = min(CLASS_BLOCK * values // 256, max(64, triton.next_power_of_2(C)))
    warps = max(1, block // values)
    run = min(RUN, block)
    capacity = C if every_rank else min(C, RUN)
    buffers = (2 if capacity > run else 1) + (1 if work == torch.float64 else 0)
    stride_rows = every_rank or top_k
    programs = min(N, ROWS_A_LAUNCH)
    if stride_rows:
        program_bytes = 8 * capacity * buffers + (work.itemsize * C if top_k else 0)
        programs = min(N, 32 // warps * _processors(device), max(1, SCRATCH_BYTES // program_bytes))
    options = {"num_warps": warps}
    if torch.version.hip is None:
        # Two programs of 8 warps on an SM, so that one computes while the other's loads are under way; at 96 registers
        # the sort spills. In a loop over rows its addresses stay in registers from row to row, up to 219 of them, and
        # without a limit of our own the compiler sets itself one of 128 on sm_90 and spills.
        options["maxnreg"] = 255 if stride_rows or work == torch.float64 else 128
    return Stream(programs, capacity, buffers, block, run, stride_rows, options)


def reduction(N: int) -> Span:
    """One program up to 8192 rows, a few microseconds of latency; else two stages, first at most 256 programs."""
    if N <= 8 * ROW_BLOCK:
        return Span(1, triton.cdiv(max(N, 1), ROW_BLOCK) * ROW_BLOCK)
    span = triton.cdiv(triton.cdiv(N, 256), ROW_BLOCK) * ROW_BLOCK
    return Span(triton.cdiv(N, span), span)


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
