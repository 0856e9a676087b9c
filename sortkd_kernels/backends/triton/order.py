# ruff: noqa: ANN001, ANN201, SIM102 - in a kernel annotations are types of the compiler, and a constant `if` stands alone
"""The classes above a label, put in order in a program's scratch memory, and the values that they come to hold.

Only these classes are touched. They are collected while the row streams by. A few are ordered by counting for each the
keys before it; many are sorted in runs that fit in registers, which are merged pairwise, each key finding its place by
binary search in the sibling run: near ``r log r`` for any rank ``r``.

A key is 64 bits: above, 32 bits that grow as the value falls; below, the class. Keys are therefore unique, and equal
values keep the lower class first. A float64 value has two such halves and is sorted twice, lower half first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_math import INFINITY, INTERPRETED, PIECES

LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LOW = tl.constexpr(0xFFFFFFFF)
# Keys ordered by counting, a step for each. The interpreter pays milliseconds for a step, and for a stage of a sort.
COUNTED = tl.constexpr(16 if INTERPRETED else 128)
# A sorted run: 45 compare stages. Merging is cheaper than the longer network, and compiles in a fraction of the time.
RUN = tl.constexpr(32 if INTERPRETED else 512)


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
    """Append the keys of the classes of a row's tile that lie ``above`` the label, ``found`` being there.

    Keys over the capacity are dropped; the caller counts, and leaves such a row to a launch with more room.
    """
    order = descending(t).to(tl.int64)
    if t.dtype == tl.float64:
        order = (order & LOW) - 0x80000000
    marks = above.to(tl.int32)
    pieces = tl.sum(marks, 2)
    place = found + (tl.cumsum(pieces, PIECES) - pieces)[:, :, None] + tl.cumsum(marks, 2) - 1
    tl.store(keys + place, (order << 32) | classes.to(tl.int64), mask=above & (place < capacity))


@triton.jit
def sort_by_counting(keys, n):
    """Sort ``keys[:n]``, at most COUNTED, in place."""
    k = tl.arange(0, COUNTED)
    x = tl.load(keys + k, mask=k < n, other=LAST)
    place = tl.zeros_like(k)
    for i in range(n):
        place += (tl.load(keys + i) < x).to(tl.int32)
    tl.debug_barrier()
    tl.store(keys + place, x, mask=k < n)


@triton.jit
def sort_run(keys, start, n):
    """Sort ``keys[start : min(start + RUN, n)]`` in place."""
    k = start + tl.arange(0, RUN)
    x = tl.sort(tl.load(keys + k, mask=k < n, other=LAST))
    # Where the run is shorter than the block has threads, warps load it in duplicate: none may store before all have.
    tl.debug_barrier()
    tl.store(keys + k, x, mask=k < n)


@triton.jit
def merge_runs(source, target, n, length, STEP: tl.constexpr):
    """Merge sorted runs of ``length`` keys pairwise from ``source`` into ``target``.

    STEP keys search at a time: each step of a search waits for memory, and several of a lane wait together.
    """
    for start in range(0, n, STEP):
        k = start + tl.arange(0, STEP)
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
def sort_keys(keys, at, spare, n, LISTED: tl.constexpr, STEP: tl.constexpr):
    """Sort the n keys that begin at ``keys + at``; returns where they begin afterwards: there or at ``spare``."""
    tl.debug_barrier()
    if n <= COUNTED:
        sort_by_counting(keys + at, n)
    if LISTED:
        if n > COUNTED:
            for start in range(0, n, RUN):
                sort_run(keys + at, start, n)
            tl.debug_barrier()
            length = tl.full([], RUN, tl.int32)
            while length < n:
                merge_runs(keys + at, keys + spare, n, length, STEP)
                tl.debug_barrier()
                at, spare = spare, at
                length = length * 2
    tl.debug_barrier()
    return at


@triton.jit
def put_in_order(keys, n, teacher, stride, capacity, LISTED: tl.constexpr, WORK: tl.constexpr, STEP: tl.constexpr):
    """Order n collected keys; returns where the keys begin whose lower halves are the classes in order.

    ``keys`` has two buffers of ``capacity``, and a third for float64. Without LISTED n is at most COUNTED. STEP: the
    keys that are moved at a time.
    """
    at = sort_keys(keys, tl.zeros_like(n), tl.zeros_like(n) + capacity, n, LISTED, STEP)
    if tl.float64 == WORK:
        # Least significant half done. Now the upper half, with the place in the order so far in the class's stead.
        names = keys + 2 * capacity
        for start in range(0, n, STEP):
            k = start + tl.arange(0, STEP)
            name = tl.load(keys + at + k, mask=k < n, other=0) & LOW
            value = tl.load(teacher + name * stride, mask=k < n, other=0).to(WORK)
            tl.debug_barrier()
            tl.store(names + k, name, mask=k < n)
            tl.store(keys + at + k, ((descending(value) >> 32) << 32) | k.to(tl.int64), mask=k < n)
        at = sort_keys(keys, at, capacity - at, n, LISTED, STEP)
        for start in range(0, n, STEP):
            k = start + tl.arange(0, STEP)
            place = tl.load(keys + at + k, mask=k < n, other=0) & LOW
            name = tl.load(names + place, mask=k < n, other=0)
            tl.debug_barrier()
            tl.store(keys + at + k, name, mask=k < n)
        tl.debug_barrier()
    return at


@triton.jit
def keep(keys, spare, start, n, classes, x, STEP: tl.constexpr):
    """Put a value beside each of STEP ``classes`` from place ``start`` of the order on, for :func:`kept`.

    In order, a key's upper half has done its work; a float64 value takes the buffer that its names have left.
    """
    k = start + tl.arange(0, STEP)
    if x.dtype == tl.float64:
        tl.store(spare + k, x.to(tl.int64, bitcast=True), mask=k < n)
    else:
        tl.store(keys + k, (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | classes, mask=k < n)


@triton.jit
def kept(keys, spare, start, n, WORK: tl.constexpr, STEP: tl.constexpr):
    """What :func:`keep` has put there."""
    k = start + tl.arange(0, STEP)
    if tl.float64 == WORK:
        return tl.load(spare + k, mask=k < n, other=0).to(WORK, bitcast=True)
    else:
        return (tl.load(keys + k, mask=k < n, other=0) >> 32).to(tl.int32).to(WORK, bitcast=True)


@triton.jit
def corrected_above(keys, start, n, teacher, stride, t_y, correction, WORK: tl.constexpr, STEP: tl.constexpr):
    """STEP classes above the label, from place ``start`` of their order on, and their corrected values.

    Past the end the values are -inf.
    """
    k = start + tl.arange(0, STEP)
    inside = k < n
    classes = tl.load(keys + k, mask=inside, other=0) & LOW
    # Sorted, each takes the value of the next in order, the last one that of the label. Swapped, the first one that.
    follows = (k + 1 < n) & (correction == 1)
    source = tl.where(follows, tl.load(keys + k + 1, mask=follows, other=0) & LOW, classes)
    t = tl.load(teacher + source * stride, mask=inside, other=-INFINITY).to(WORK)
    to_label = tl.where(correction == 1, k + 1 == n, k == 0)
    return classes, inside, tl.where(inside & to_label, t_y, t)
