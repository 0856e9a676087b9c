"""The launch choices of the Triton kernels, each with its reason. Nothing else in the backend holds such a number.

No GPU has timed them: they follow from the register file and from what `offline.py` reads off the compiled kernels.
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

# The most classes of a row held in registers: 16384 values of both sides are half of an SM's register file. Doubles
# take twice the room, and so do the further sums of a z-score or of a temperature's gradient (they spill at 16384).
ON_CHIP_CLASSES = {torch.float32: 16384, torch.float64: 4096}

# A rank that the row's own program settles, one reduction a step. Trained teachers stay below it on nearly all rows.
SHALLOW_RANK = 8

# A sorted run: 55 compare stages. The network of 4096 keys has 78, takes four times the code and three seconds to
# compile, and merging is as cheap. Small runs, which most are, have a network of 21 stages. The interpreter pays
# milliseconds of Python for each stage.
RUN = 32 if INTERPRETED else 1024
SMALL_RUN = 16 if INTERPRETED else 64

# Classes that a streaming program takes at a time, 8 values a lane with 8 warps. At 4096 the compiler takes 200
# registers, and one program has an SM to itself with nothing to do while a block's loads are under way.
CLASS_BLOCK = 2048

# Rows that a block of the small kernels takes at a time.
ROW_BLOCK = 1024

# Rows of one launch where each has a run of scratch to itself: 32 MiB of keys.
ROWS_A_LAUNCH = 4096

# Scratch of a launch whose programs hold a whole row's keys: a row on each of 132 SMs up to C = 65536.
SCRATCH_BYTES = 128 << 20


class Tile(NamedTuple):
    """Rows and (padded) classes of a program of `sort_kd_tile`, and its warps."""

    rows: int
    classes: int
    num_warps: int


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


def tile(C: int, neighbours: bool) -> Tile:
    """The tile of `sort_kd_tile`.

    A warp takes 512 values: 16 a lane keep both sides, their exponentials and the coefficients below 100 registers.
    Of short rows it takes 256, as a lane then holds the scalars of several rows too. Where rows are neighbours in
    memory in place of classes (``[N, C, H, W]``), a tile needs enough of them, or each 32-byte sector is read for one
    value: 32 rows give each lane of a warp its own.
    """
    classes = max(16, triton.next_power_of_2(C))
    rows = max(1, 256 // classes)
    if neighbours:
        rows = max(rows, min(32, 16384 // classes))
    # 16 warps at 16384 values: 32 a lane, since 32 warps would leave 64 registers and no second block on the SM.
    return Tile(rows, classes, max(1, min(16, rows * classes // 512)))


def stream(N: int, C: int, work: torch.dtype, every_rank: bool, top_k: bool, device: torch.device) -> Stream:
    """A launch of `sort_kd_stream`; with ``every_rank`` its programs have room for all classes of a row."""
    block = min(CLASS_BLOCK, max(64, triton.next_power_of_2(C)))
    warps = max(1, block // 256)
    run = min(RUN, block)
    capacity = C if every_rank else min(C, RUN)
    buffers = (2 if capacity > run else 1) + (1 if work == torch.float64 else 0)
    stride_rows = every_rank or top_k
    programs = min(N, ROWS_A_LAUNCH)
    if stride_rows:
        program_bytes = 8 * capacity * buffers + (work.itemsize * C if top_k else 0)
        programs = min(N, 32 // warps * _processors(device), max(1, SCRATCH_BYTES // program_bytes))
    options = {"num_warps": warps}
    if not stride_rows and work == torch.float32 and torch.version.hip is None:
        # Three programs on an SM in place of two, for a few cold spills in the sort.
        options["maxnreg"] = 80
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
