"""How the logits of a call lie and what is launched for them: every choice in one place, each with its reason.

What depends on shapes, dtypes and strides alone is a `Plan`, made once. Everything else reaches the kernels at run
time, so that new weights or another batch size compile nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bucket import sort_kd_bucket
from .logits import sort_kd_logits
from .long_rows import sort_kd_long_rows
from .order import COUNTED
from .row_io import ANY, COUNTERS, NEIGHBOURS, ONE_STRIDE, TWO_STRIDES, sort_kd_count, sort_kd_scale
from .row_math import INTERPRETED
from .short_rows import sort_kd_short_rows

WORK = {torch.float32: tl.float32, torch.float64: tl.float64}


def arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    """What logits of these dtypes are computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


# The most classes of a row held in registers: 32 values of either side a lane with 8 warps. The further sums of a
# general row take half of that room, and doubles half again.
SHORT_ROW = 8192

# The classes that a program takes of a long row at a time: 8 values of either side a lane with 8 warps. Where it takes
# KD's sums alone it takes twice as many.
LONG_BLOCK = 2048

# Registers of a lane: 16 warps a processor, some of which load while others compute; one less for short rows, which
# spill on sm_100 otherwise; 21 where a lane has 16 values of either side. The sort of large ranks, the rare case,
# general short rows and doubles take more.
REGISTERS = 128
REGISTERS_OF_SHORT_ROW = 136
REGISTERS_OF_HALF_A_TILE = 96
MOST_REGISTERS = 255

# A rank that a row's own program settles in registers, one walk over the row a step. The labels of a trained teacher
# rank so low on nearly all rows. Rows of so few classes are walked to any rank: a launch that has mostly nothing to do
# costs a small batch more than a long walk.
MAX_RANK = 8
WALKED_CLASSES = 128

# Up to here every program counts the labels itself, 128 a lane: less work than another launch.
COUNTED_ROWS = 4096

# The logarithm of the number of row terms that one program adds up, not fewer than the rows of a program (`_short`).
# More of them take a second stage, of at most MAX_GROUPS sums.
GROUP_BITS = 10

# Scratch of a launch whose programs hold a row each: it bounds their number.
SCRATCH_BYTES = 64 << 20


def options(warps: int, registers: int) -> dict[str, Any]:
    """Compiler options.

    Labels outside the classes are asserted on the device, as F.cross_entropy does. Triton's debug mode would also check
    every integer addition for overflow, which the kernels do not want.
    """
    limit = {} if torch.version.hip else {"maxnreg": registers}
    return {"num_warps": warps, "debug": True, "sanitize_overflow": False, **limit}


class Launch:
    """A kernel with what all of its calls share.

    The first call compiles. The later ones go past Triton's argument binder, which takes longer than all the rest: what
    the compiled form rests on, dtypes and alignments, must be the same, and so is a part of every cache's key.
    """

    def __init__(self, kernel: Any, programs: int, warps: int, registers: int = REGISTERS, **constants: Any) -> None:
        self.kernel, self.grid, self.constants = kernel, (programs, 1, 1), constants
        self.options = options(warps, registers)
        self._values = tuple(constants.values())
        self._run: Callable[..., None] | None = None

    def __call__(self, pointers: tuple[Tensor, ...], numbers: tuple) -> None:
        if self._run is not None:
            self._run(*[p.data_ptr() for p in pointers], *numbers, *self._values)
            return
        compiled = self.kernel[self.grid](*pointers, *numbers, **self.constants, **self.options)
        if not INTERPRETED:
            self._run = compiled[self.grid]


class Rows(NamedTuple):
    """Student, teacher and gradient as rows (`row_io.py`).

    Attributes:
        layout: LAYOUT of the kernels.
        inner: the rows of the inner dimension.
        align: what divides all steps between rows, at most 16.
        strides: the outer, inner and class stride of each, those between rows in units of align.
    """

    layout: int
    inner: int
    align: int
    strides: tuple[int, ...]


class Scratch(NamedTuple):
    """What a launch of `sort_kd_long_rows` needs: keys that a program has room for, of all programs, dense values."""

    capacity: int
    keys: int
    dense: int


class Plan(NamedTuple):
    """The launches of a loss.

    Attributes:
        rows: how the logits lie.
        count: counts the labels, where the programs of the others do not.
        first: takes all rows.
        listed: takes those whose rank is over max_rank, which the first one leaves; None where there can be none.
        scratch: of the first, if it is one of long rows, and of the listed one.
    """

    rows: Rows
    count: Launch | None
    first: Launch
    listed: Launch | None
    max_rank: int
    scratch: tuple[Scratch | None, Scratch | None]


@functools.lru_cache(maxsize=1024)
def plan(
    shape: torch.Size, strides: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, torch.dtype], k: int,
    indices: torch.dtype | None, ce: int, general: bool, correction: int, mean: bool, aligned: tuple[bool, ...],
    device: torch.device,
) -> Plan | None:  # fmt: skip
    """The plan for a student of ``shape`` and a teacher with all classes or ``k``; None for strides without one.

    Args:
        strides: of student, teacher and gradient.
        indices: the dtype of the k classes: kernels that read another are others.
        ce: CE of the kernels.
        general: GENERAL of the kernels.
        correction: 0 none, 1 sort, 2 swap; in registers a swap has one step whatever the rank.
        mean: whether rows are counted.
        aligned: whether student, teacher and gradient lie at multiples of 16 bytes. Kernels that rely on it are others.
    """
    C = shape[-1]
    N = math.prod(shape[:-1])
    if k:  # its rows are written out
        strides = (strides[0], strides[0], strides[2])
    rows = _rows(shape, strides)
    if rows is None:
        return None
    work = arithmetic(*dtypes)
    vector = 16 // min(d.itemsize for d in dtypes)
    constants = {"CE": ce, "GENERAL": general, "LAYOUT": rows.layout, "ALIGN": rows.align, "WORK": WORK[work]}
    count = None
    if mean and N > COUNTED_ROWS:
        count = Launch(sort_kd_count, COUNTERS.value, 4, BLOCK=1024)
    values = (32 if not general else 16) // (2 if work == torch.float64 else 1)  # of either side a lane
    if not k and SHORT_ROW * values // 32 >= C:
        first, scratch = _short(N, C, rows, vector, values, constants), None
        max_rank = C - 1 if C <= WALKED_CLASSES else MAX_RANK
    else:
        first, scratch = _long(N, C, vector, work, k, False, device, constants)
        max_rank = COUNTED.value
    listed, second = None, None
    if max_rank < C - 1 and (correction == 1 or (correction == 2 and scratch is not None)):
        listed, second = _long(N, C, vector, work, k, True, device, constants)
    return Plan(rows, count, first, listed, max_rank, (scratch, second))


@functools.lru_cache(maxsize=64)
def logits_plan(
    N: int, C: int, strides: tuple[int, ...], dtype: torch.dtype, listed: bool, aligned: bool, device: torch.device
) -> tuple[Launch, Scratch]:
    """A launch of the correction alone. By `strides`: on ROCm, Triton has another kernel for tensors under 2 GiB."""
    work = arithmetic(dtype)
    warps = min(8, max(1, triton.next_power_of_2(C) // 256))
    capacity = C if listed else COUNTED.value
    programs = _programs(N, warps, 8 * capacity * _buffers(work), device)
    registers = MOST_REGISTERS if listed else REGISTERS
    align = math.gcd(16, C, strides[0]) if strides[1] == 1 else 0
    constants = {"WORK": WORK[work], "LISTED": listed, "B": warps * 256, "ALIGN": align}
    launch = Launch(sort_kd_logits, programs, warps, registers, **constants)
    return launch, Scratch(capacity, programs * capacity * _buffers(work), 0)


@functools.lru_cache(maxsize=256)
def bucket(
    N: int, C: int, k: int, dtypes: tuple[torch.dtype, ...], aligned: tuple[bool, bool], device: torch.device
) -> tuple[Launch, int]:
    """A launch of `sort_kd_bucket`, and its programs, each of which has C bytes of scratch.

    Args:
        dtypes: of student, teacher and indices.
        aligned: whether student and gradient lie at multiples of 16 bytes.
    """
    work = arithmetic(*dtypes)
    block = min(LONG_BLOCK, max(128, triton.next_power_of_2(C)))
    warps = max(1, block // 256)
    programs = _programs(N, warps, C, device)
    constants = {"WORK": WORK[work], "K": triton.next_power_of_2(k + 2), "B": block, "ALIGN": math.gcd(16, C)}
    return Launch(sort_kd_bucket, programs, warps, MOST_REGISTERS, **constants), programs


@functools.lru_cache(maxsize=256)
def scale(total: int, dtypes: tuple[torch.dtype, torch.dtype], aligned: bool, device: torch.device) -> Launch:
    """A launch of the rescaling: four programs a processor, which is enough to keep its memory busy.

    Args:
        dtypes: of the gradient and of what multiplies it.
    """
    work = arithmetic(dtypes[0])
    programs = min(triton.cdiv(total, 4096), 4 * _processors(device))
    return Launch(sort_kd_scale, programs, 8, WORK=WORK[work], BLOCK=4096, ALIGN=math.gcd(16, total))


def _short(N: int, C: int, rows: Rows, vector: int, values: int, constants: dict[str, Any]) -> Launch:
    """A launch of `sort_kd_short_rows`.

    Every lane of a row does the arithmetic of the row's end, so a row has as few lanes as its values allow, and a warp
    several short rows; not more than 8 of them, since all wait for the one whose label ranks lowest.
    """
    padded = max(16, triton.next_power_of_2(C))
    if rows.layout == NEIGHBOURS.value:
        # Rows are neighbours in memory in place of classes ([N, C, H, W]): a row for each lane of a warp, or each
        # sector of 32 bytes is read for one value.
        R = max(1, min(32, SHORT_ROW * values // 32 // padded))
        pieces, classes, warps = 1, padded, max(1, R * padded // (32 * values))
        programs = N // rows.inner * triton.cdiv(rows.inner, R)
    else:
        lanes = max(4, padded // min(16, values)) if padded < 16 * 32 else max(32, padded // values)
        # As many classes of a lane lie side by side as it loads at once: else its others would be other rows'.
        classes = min(padded, lanes * min(vector, rows.align))
        pieces, warps, R = padded // classes, max(1, lanes // 32), max(1, 32 // lanes)
        programs = triton.cdiv(N, R)
    tile = {"C": C, "R": R, "K": pieces, "L": classes}
    # Of 8 warps a processor has one program anyway; general rows would spill.
    registers = REGISTERS_OF_HALF_A_TILE if R * padded <= 16 * 32 * warps else REGISTERS_OF_SHORT_ROW
    if constants["GENERAL"] or warps == 8:
        registers = MOST_REGISTERS
    return Launch(sort_kd_short_rows, programs, warps, registers, **constants, **tile)


def _long(
    N: int, C: int, vector: int, work: torch.dtype, k: int, listed: bool, device: torch.device,
    constants: dict[str, Any],
) -> tuple[Launch, Scratch]:  # fmt: skip
    """A launch of `sort_kd_long_rows`.

    Two programs of 8 warps a processor keep so few rows under way that the second pass finds them in the level 2 cache.
    """
    values = 4 if work == torch.float64 else 8 if listed or k or constants["GENERAL"] else 16
    block = min(LONG_BLOCK * values // 8, max(32 * values, triton.next_power_of_2(C)))
    warps = max(1, block // (32 * values))
    pieces = max(1, values // vector)
    capacity = C if listed else COUNTED.value
    dense = C if k else 0
    programs = _programs(N, warps, 8 * capacity * _buffers(work) + work.itemsize * dense, device)
    tile = {"LISTED": listed, "TOP_K": bool(k), "K": pieces, "L": block // pieces}
    registers = MOST_REGISTERS if listed or work == torch.float64 else REGISTERS
    launch = Launch(sort_kd_long_rows, programs, warps, registers, **constants, **tile)
    return launch, Scratch(capacity, programs * capacity * _buffers(work), programs * dense)


def _buffers(work: torch.dtype) -> int:
    """Buffers of keys that `order.put_in_order` works in."""
    return 3 if work == torch.float64 else 2


def _programs(N: int, warps: int, scratch_bytes: int, device: torch.device) -> int:
    """Programs that take rows in turn: 16 warps a processor, as far as the scratch of each allows."""
    return max(1, min(N, 16 // warps * _processors(device), SCRATCH_BYTES // scratch_bytes))


@functools.cache
def _processors(device: torch.device) -> int:
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _rows(shape: torch.Size, strides: tuple[tuple[int, ...], ...]) -> Rows | None:
    """Logits as rows with one or two strides between them, or None."""
    sizes = shape[:-1]
    found = None
    for split in range(len(sizes) or 1):
        steps = [(_one_stride(sizes[:split], s[:split]), _one_stride(sizes[split:], s[split:-1])) for s in strides]
        if all(outer is not None and inner is not None for outer, inner in steps):
            found = steps, math.prod(sizes[split:]), split == 0
            break
    if found is None:
        return None
    steps, inner, one = found
    by_class = [1 if shape[-1] == 1 else s[-1] for s in strides]
    if all(c == 1 for c in by_class):
        layout = ONE_STRIDE if one else TWO_STRIDES
        align = math.gcd(16, shape[-1], *itertools.chain(*steps))
        if one:
            steps = [(step, step) for _, step in steps]
    else:
        layout = NEIGHBOURS if all(step == 1 for _, step in steps) else ANY
        align = 1
    flat = [x for (outer, step), c in zip(steps, by_class, strict=True) for x in (outer // align, step // align, c)]
    return Rows(layout.value, inner, align, tuple(flat))


def _one_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one stride that walks all of these dimensions in order, 0 for none, or None where there is no such one."""
    dims = [(n, step) for n, step in zip(sizes, strides, strict=True) if n != 1]
    if any(step != n * finer for (_, step), (n, finer) in itertools.pairwise(dims)):
        return None
    return dims[-1][1] if dims else 0
