# ruff: noqa: ANN001, ANN201, SIM102 - in a kernel annotations are types of the compiler, and a constant `if` stands alone
"""Where a row lies, what it is called with, and where its results go.

Rows are counted in the order of the target. Row ``r`` of logits ``[outer, inner, C]`` begins at
``r // INNER * outer_stride + r % INNER * inner_stride``, in 64 bits: ``N * C`` passes 2**31 at 16384 x 131072.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_math import rounded, wide

# LAYOUT of the logits: class after class, with one stride from row to row or with two; or row after row, as in
# [N, C, H, W]; or any strides. A stride known to be 1 is what makes wide accesses.
ONE_STRIDE = tl.constexpr(0)
TWO_STRIDES = tl.constexpr(1)
NEIGHBOURS = tl.constexpr(2)
ANY = tl.constexpr(3)

# What multiplies a row's gradient besides `grad_output`: nothing, or 1/n with n counted in the program, or
# summed up from what `sort_kd_count` has counted.
COUNT_LABELS = tl.constexpr(1)
SUM_COUNTS = tl.constexpr(2)
COUNTERS = tl.constexpr(64)

# Row terms are added up by groups of rows, and the groups' sums by the program that ends the last group.
MAX_GROUPS = tl.constexpr(256)
SLOT_BLOCK = tl.constexpr(128)


@triton.jit
def row_start(row, outer, inner, outer_stride, inner_stride, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Where a row begins. The strides are in units of ALIGN elements: so the compiler knows what divides them."""
    if LAYOUT == ONE_STRIDE:
        return row.to(tl.int64) * (outer_stride * ALIGN)
    return outer.to(tl.int64) * (outer_stride * ALIGN) + inner.to(tl.int64) * (inner_stride * ALIGN)


@triton.jit
def tile_start(x, rows, outer, inner, outer_stride, inner_stride, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to the first class of each row of a tile."""
    if LAYOUT == NEIGHBOURS:
        # What the rows share apart from what tells them apart: else the compiler does not see that they are neighbours.
        return x + outer.to(tl.int64) * outer_stride + wide(inner)
    return x + wide(row_start(rows, outer, inner, outer_stride, inner_stride, LAYOUT, ALIGN))


@triton.jit
def class_offset(classes, stride, LAYOUT: tl.constexpr):
    """Where each class lies from its row's beginning."""
    if LAYOUT >= NEIGHBOURS:
        return classes.to(tl.int64) * stride
    else:
        return classes.to(tl.int64)


@triton.jit
def read_label(target, rows, inside, ignore_index, C):
    """The label of each row, 0 where there is none, and whether the row counts."""
    label = tl.load(target + rows, mask=inside, other=0)
    counts = inside & (label != ignore_index)
    known = (label >= 0) & (label < C)
    # What F.cross_entropy does on a GPU. A build without assertions reads no memory for such a row either.
    tl.device_assert(known | (counts == 0), "sortkd_kernels: a label is outside [0, C) and is not ignore_index")
    counts = counts & known
    return tl.where(counts, label, 0).to(tl.int32), counts


@triton.jit
def read_temperature(temperatures, stride, temperature, rows, counts, GENERAL: tl.constexpr, WORK: tl.constexpr):
    """The temperature of each row: the number, or for stride 0 or 1 a tensor's, one for all or one a row."""
    T = tl.full(rows.shape, temperature, WORK)
    if GENERAL:
        if stride >= 0:
            T = tl.load(temperatures + rows * stride, mask=counts, other=1).to(WORK)
    return T


@triton.jit
def count_rows(target, counts, N, ignore_index, mean, WORK: tl.constexpr):
    """The number of rows that count, or 1 where the loss is no mean."""
    n = tl.full([], 1, tl.int32)
    if mean == COUNT_LABELS:
        seen = tl.zeros([SLOT_BLOCK], tl.int32)
        for start in range(0, N, SLOT_BLOCK):
            rows = start + tl.arange(0, SLOT_BLOCK)
            label = tl.load(target + rows, mask=rows < N, other=0)
            seen += ((label != ignore_index) & (rows < N)).to(tl.int32)
        n = tl.sum(seen, 0)
    if mean == SUM_COUNTS:
        n = tl.sum(tl.load(counts + tl.arange(0, COUNTERS)), 0)
    return n.to(WORK)


@triton.jit(do_not_specialize=["target", "counts", "N", "ignore_index"])
def sort_kd_count(target, counts, N: tl.int32, ignore_index: tl.int64, BLOCK: tl.constexpr):
    """Each of COUNTERS programs counts its share of the rows."""
    seen = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, N, COUNTERS * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        label = tl.load(target + rows, mask=rows < N, other=0)
        seen += ((label != ignore_index) & (rows < N)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(seen, 0))


@triton.jit
def read_factor(grad_output, stride, rows, counts, n, WORK: tl.constexpr):
    """What multiplies a row's gradient: `grad_output`, for stride 0 or 1, over the rows that count."""
    factor = tl.full(rows.shape, 1.0, WORK)
    if stride >= 0:
        factor = tl.load(grad_output + rows * stride, mask=counts, other=0).to(WORK)
    return tl.where(counts, factor / n, 0.0)


@triton.jit
def last_of_group(rows, done, tickets, group, N, group_bits):
    """The program's rows of a group, if with them all of the group are done."""
    ours = done & (rows >> group_bits == group)
    ended = tl.sum(ours.to(tl.int32), 0)
    before = tl.atomic_add(tickets + 1 + group, ended, sem="release")
    return ours & (before + ended == tl.minimum(1 << group_bits, N - (group << group_bits)))


@triton.jit
def store_row(
    terms, rows, done, counts, loss, kd, ce, grad_temperature, slots, tickets, N, group_bits, reduction, parts,
    learned, kd_weight, ce_weight, CE: tl.constexpr, GENERAL: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Store what a row has once; for a sum, whether it was the last of its group to do so.

    Before the gradient is written: the ticket waits until all of the lane's stores can be seen.
    """
    row_kd, row_ce, by_temperature = terms
    row_kd = tl.where(counts, row_kd, 0.0)
    row_ce = tl.where(counts, row_ce, 0.0)
    if GENERAL:
        if learned != 0:
            tl.store(grad_temperature + rows, tl.where(counts, by_temperature, 0.0), mask=done)
    last = rows < 0
    if reduction == 0:
        tl.store(loss + rows, loss_of(row_kd, row_ce, kd_weight, ce_weight), mask=done)
        if parts != 0:
            tl.store(kd + rows, row_kd, mask=done)
            tl.store(ce + rows, row_ce, mask=done)
    else:
        tl.store(slots + rows, row_kd, mask=done)
        if CE != 0:
            tl.store(slots + N + rows, row_ce, mask=done)
        tl.debug_barrier()
        # Once a program, not once a row: all operations on a group's ticket wait for one another. Only rows that are
        # neighbours may lie in two groups; places behind the last row have no group.
        group = rows >> group_bits
        first = tl.min(group, 0)
        last = last_of_group(rows, done, tickets, first, N, group_bits)
        if LAYOUT == NEIGHBOURS:
            if tl.max(tl.where(done, group, first), 0) > first:
                last = last | last_of_group(rows, done, tickets, first + 1, N, group_bits)
    return last


@triton.jit
def loss_of(kd, ce, kd_weight, ce_weight):
    """The loss. Asked for as a part only, an infinite cross-entropy leaves it alone."""
    loss = tl.full(kd.shape, kd_weight, kd.dtype) * kd
    weight = tl.full(kd.shape, ce_weight, kd.dtype)
    return loss + tl.where(weight == 0, 0.0, weight * ce)


@triton.jit
def sum_slots(slots, begin, end):
    """The sum of values in memory, in an order that depends on their number alone."""
    values = tl.zeros([SLOT_BLOCK], slots.dtype.element_ty)
    for start in range(begin, end, SLOT_BLOCK):
        place = start + tl.arange(0, SLOT_BLOCK)
        values += tl.load(slots + place, mask=place < end, other=0)
    return tl.sum(values, 0)


@triton.jit
def reduce_rows(
    last, rows, loss, kd, ce, slots, tickets, N, n, group_bits, parts, kd_weight, ce_weight, CE: tl.constexpr
):
    """Where a program has stored the last row of a group: the group's sums, and after the last group the loss.

    Whoever comes last puts the ticket back to 0 for the next call, and by that operation sees what the others stored.
    """
    if tl.max(last.to(tl.int32), 0) > 0:
        group = rows >> group_bits
        # A program's rows may lie in two groups.
        for g in range(tl.min(group, 0), tl.max(group, 0) + 1):
            if tl.max((last & (group == g)).to(tl.int32), 0) > 0:
                tl.atomic_xchg(tickets + 1 + g, 0, sem="acquire")
                tl.debug_barrier()  # one thread has acquired what all of them read
                begin = g << group_bits
                end = tl.minimum(begin + (1 << group_bits), N)
                kd_sum = sum_slots(slots, begin, end)
                ce_sum = tl.zeros_like(kd_sum)
                sums = slots + N
                if CE != 0:
                    ce_sum = sum_slots(slots, N + begin, N + end)
                    sums = slots + 2 * N
                groups = ((N - 1) >> group_bits) + 1
                complete = groups == 1
                if groups > 1:
                    tl.store(sums + g, kd_sum)
                    tl.store(sums + MAX_GROUPS + g, ce_sum)
                    tl.debug_barrier()
                    complete = tl.atomic_add(tickets, 1, sem="release") + 1 == groups
                    if complete:
                        tl.atomic_xchg(tickets, 0, sem="acquire")
                        tl.debug_barrier()
                        kd_sum = sum_slots(sums, 0, groups)
                        ce_sum = sum_slots(sums + MAX_GROUPS, 0, groups)
                if complete:
                    # No row that counts: 0 / 0, NaN as in F.cross_entropy.
                    kd_sum = kd_sum / n
                    ce_sum = ce_sum / n
                    tl.store(loss, loss_of(kd_sum, ce_sum, kd_weight, ce_weight))
                    if parts != 0:
                        tl.store(kd, kd_sum)
                        tl.store(ce, ce_sum)


@triton.jit(do_not_specialize=["grad_output", "total"])
def sort_kd_scale(
    grad_student, grad_output, total: tl.int64, WORK: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr
):
    """Multiply a dense gradient, of a multiple of ALIGN numbers, in place by one number.

    The programs look at it before they touch the gradient: 1, as a plain ``loss.backward()`` has it, costs a launch of
    a few programs and no traffic, and the host need not know.
    """
    factor = tl.load(grad_output).to(WORK)
    if factor != 1:
        total = total // ALIGN * ALIGN
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, total, step):
            place = start + tl.arange(0, BLOCK)
            g = tl.load(grad_student + place, mask=place < total)
            g = rounded(g.to(WORK) * factor, grad_student.dtype.element_ty)
            tl.store(grad_student + place, g, mask=place < total)
