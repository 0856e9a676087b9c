# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The classes above a label, put in order in a program's scratch memory.

For ranks too large to walk one reduction at a time. Only the classes above the label are touched: they are collected
while the row streams by, sorted in runs that fit in registers, and runs are merged pairwise, each key finding its place
by binary search in the sibling run: near ``r log r`` for any rank ``r``.

A key is 64 bits: above, 32 bits that grow as the value falls; below, the class. Keys are therefore unique, and equal
values keep the lower class first. A float64 value has two such halves and is sorted twice, lower half first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch
from .sums import INFINITY

LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LOW = tl.constexpr(0xFFFFFFFF)
SMALL_RUN = tl.constexpr(launch.SMALL_RUN)


@triton.jit
def descending(t):
    """Integers in the opposite order of floats: signed, of the same width, +0 and -0 alike."""
    t = tl.where(t == 0, 0.0, t)
    if t.dtype == tl.float64:
        bits = t.to(tl.int64, bitcast=True)
        return ~(bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
    else:
        bits = t.to(tl.int32, bitcast=True)
        return ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def collect(keys, t, classes, above, found, capacity):
    """Append the keys of a tile's classes ``above`` the label, ``found`` being there already.

    Keys over the capacity are dropped; the caller counts, and leaves such a row to a launch with more room.
    """
    order = descending(t).to(tl.int64)
    if t.dtype == tl.float64:
        order = (order & LOW) - 0x80000000
    place = found + tl.cumsum(above.to(tl.int32), 1) - 1
    tl.store(keys + place, (order << 32) | classes.to(tl.int64), mask=above & (place < capacity))


@triton.jit
def sort_run(keys, start, n, RUN: tl.constexpr):
    """Sort ``keys[start : min(start + RUN, n)]`` in place."""
    k = start + tl.arange(0, RUN)
    x = tl.sort(tl.load(keys + k, mask=k < n, other=LAST))
    # Where the run is shorter than the block has threads, warps load it in duplicate: none may store before all have.
    tl.debug_barrier()
    tl.store(keys + k, x, mask=k < n)


@triton.jit
def merge_runs(source, target, n, length, B: tl.constexpr):
    """Merge sorted runs of ``length`` keys pairwise from ``source`` into ``target``."""
    for start in range(0, n, B):
        k = start + tl.arange(0, B)
        inside = k < n
        key = tl.load(source + k, mask=inside, other=LAST)
        run = k // length
        sibling = (run ^ 1) * length
        low = tl.zeros_like(k)
        high = tl.minimum(tl.maximum(n - sibling, 0), length)
        width = length
        while width > 0:
            middle = (low + high) // 2
            searching = low < high
            probe = tl.load(source + sibling + middle, mask=inside & searching, other=LAST)
            low = tl.where(searching & (probe < key), middle + 1, low)
            high = tl.where(searching & (probe > key), middle, high)
            width = width // 2
        tl.store(target + (k + (run // 2 * 2 - run) * length + low), key, mask=inside)


@triton.jit
def sort_keys(keys, at, spare, n, RUN: tl.constexpr, MERGE: tl.constexpr):
    """Sort the n keys that begin at ``keys + at``; returns where they begin afterwards: there or at ``spare``."""
    tl.debug_barrier()
    if n <= SMALL_RUN:
        sort_run(keys + at, 0, n, SMALL_RUN)
    else:
        for start in range(0, n, RUN):
            sort_run(keys + at, start, n, RUN)
    tl.debug_barrier()
    if MERGE:
        length = RUN
        while length < n:
            merge_runs(keys + at, keys + spare, n, length, RUN)
            tl.debug_barrier()
            at, spare = spare, at
            length = length * 2
    return at


@triton.jit
def put_in_order(keys, n, teacher, teacher_class, capacity, RUN: tl.constexpr, MERGE: tl.constexpr, WORK: tl.constexpr):
    """Order n collected keys; returns where the keys begin whose lower halves are the classes in order.

    ``keys`` has room for one buffer of ``capacity``, one more for MERGE and one more for float64.
    """
    at = sort_keys(keys, tl.zeros_like(n), tl.zeros_like(n) + capacity, n, RUN, MERGE)
    if tl.float64 == WORK:
        # Least significant half done. Now the upper half, with the place in the order so far in the class's stead.
        names = keys + (2 if MERGE else 1) * capacity
        for start in range(0, n, RUN):
            k = start + tl.arange(0, RUN)[None, :]
            name = tl.load(keys + at + k, mask=k < n, other=0) & LOW
            value = tl.load(teacher + name * teacher_class, mask=k < n, other=0).to(WORK)
            tl.debug_barrier()
            tl.store(names + k, name, mask=k < n)
            tl.store(keys + at + k, ((descending(value) >> 32) << 32) | k.to(tl.int64), mask=k < n)
        at = sort_keys(keys, at, capacity - at, n, RUN, MERGE)
        for start in range(0, n, RUN):
            k = start + tl.arange(0, RUN)[None, :]
            place = tl.load(keys + at + k, mask=k < n, other=0) & LOW
            name = tl.load(names + place, mask=k < n, other=0)
            tl.debug_barrier()
            tl.store(keys + at + k, name, mask=k < n)
        tl.debug_barrier()
    return at


@triton.jit
def keep(keys, spare, start, n, classes, x, B: tl.constexpr):
    """Put a value x beside each of the B ``classes`` from place ``start`` of the order on, for :func:`kept`.

    In order, a key's upper half has done its work; a float64 value takes the buffer that its names have left.
    """
    k = start + tl.arange(0, B)[None, :]
    if x.dtype == tl.float64:
        tl.store(spare + k, x.to(tl.int64, bitcast=True), mask=k < n)
    else:
        tl.store(keys + k, (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | classes, mask=k < n)


@triton.jit
def kept(keys, spare, start, n, WORK: tl.constexpr, B: tl.constexpr):
    """What :func:`keep` has put there."""
    k = start + tl.arange(0, B)[None, :]
    if tl.float64 == WORK:
        return tl.load(spare + k, mask=k < n, other=0).to(WORK, bitcast=True)
    else:
        return (tl.load(keys + k, mask=k < n, other=0) >> 32).to(tl.int32).to(WORK, bitcast=True)


@triton.jit
def corrected_above(
    keys, start, n, teacher, teacher_class, t_y, CORRECTION: tl.constexpr, WORK: tl.constexpr, B: tl.constexpr
):
    """B classes above the label, from place ``start`` of their order on, and their corrected values: ``[1, B]``.

    Past the end the values are -inf.
    """
    k = start + tl.arange(0, B)[None, :]
    inside = k < n
    classes = tl.load(keys + k, mask=inside, other=0) & LOW
    if CORRECTION == 1:
        # Each takes the value of the next in order, the last one that of the label.
        follows = k + 1 < n
        next_class = tl.load(keys + k + 1, mask=follows, other=0) & LOW
        t = tl.load(teacher + next_class * teacher_class, mask=follows, other=0).to(WORK)
        t = tl.where(follows, t, t_y[:, None])
        t = tl.where(inside, t, -INFINITY)
    else:
        t = tl.load(teacher + classes * teacher_class, mask=inside, other=-INFINITY).to(WORK)
        t = tl.where(k == 0, t_y[:, None], t)
    return classes, inside, t
