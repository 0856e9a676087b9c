# ruff: noqa: ANN001, ANN201, SIM102 - in a kernel annotations are types of the compiler, and a constant `if` stands alone
"""The loss of rows that do not fit in registers, and of rows whose label ranks too low for the launch before.

A row streams by twice: for its sums, and for its gradient. The second time it comes backwards: what was read last is
still in the caches. The classes above the label are kept out of the first pass; where there are any, a pass of its own
collects them, and they join the sums in order and corrected, so nothing is ever subtracted from a sum. The gradient may
lie over the student: what the last step needs of a logit that the step before has overwritten is kept beside the order.

Sums are relative to the label's own logits, which takes no search for maxima: no lane waits for another within a pass.
Where they leave the range of floats the pass is done again, relative to the maxima, which a pass before it finds.
GENERAL rows take these at once; their moments want small terms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import RUN, collect, corrected_above, keep, kept, put_in_order
from .row_io import (
    NEIGHBOURS,
    class_offset,
    count_rows,
    read_factor,
    read_label,
    read_temperature,
    reduce_rows,
    row_start,
    store_row,
)
from .row_math import (
    INFINITY,
    LOG2E,
    PIECES,
    added,
    exponentials,
    finish_row,
    finite_or_zero,
    first_classes,
    gradient,
    rebased,
    rounded,
    sum_lanes,
    tile_sums,
    total,
    wide,
    z_score,
)
from .short_rows import RUNTIME

# Rows that a program looks at when it searches its next one.
SEARCHED = tl.constexpr(256)


@triton.jit
def densify(values, indices, label, k_classes, row, C, live, uniform, WORK: tl.constexpr, B: tl.constexpr):
    """Write a top-k teacher's row out: ``row[:C]`` is the tail but for the k values at their classes.

    The tail is -inf, or where it is uniform and the values log-probabilities an equal share of what they leave of 1.
    On the full row the correction needs no special case for a label outside the k classes, or below their tail.
    Of several entries of the label the first one counts.
    """
    tail = tl.full([], -INFINITY, WORK)
    listed = tl.minimum(live, k_classes)
    first = k_classes
    for start in range(0, listed, B):
        k = start + tl.arange(0, B)
        is_label = tl.load(indices + k, mask=k < listed, other=-1) == label
        first = tl.minimum(first, tl.min(tl.where(is_label, k, k_classes), 0))
    if uniform != 0:
        mass = tl.zeros([B], WORK)
        present = tl.zeros([B], tl.int32)
        for start in range(0, listed, B):
            k = start + tl.arange(0, B)
            counted = (k < listed) & ((k <= first) | (tl.load(indices + k, mask=k < listed, other=0) != label))
            mass += tl.exp(tl.load(values + k, mask=counted, other=-INFINITY).to(WORK))
            present += counted.to(tl.int32)
        # Rounding may carry the mass past 1. With k = C nobody takes the tail.
        tail = tl.log(tl.maximum(1.0 - tl.sum(mass, 0), 0.0) / tl.maximum(C - tl.sum(present, 0), 1).to(WORK))
    for start in range(0, live, B):
        classes = start + tl.arange(0, B)
        tl.store(row + classes, tl.zeros([B], WORK) + tail, mask=classes < live)
    tl.debug_barrier()
    for start in range(0, listed, B):
        k = start + tl.arange(0, B)
        inside = k < listed
        value = tl.load(values + k, mask=inside, other=0).to(WORK)
        index = tl.load(indices + k, mask=inside, other=0)
        known = (index >= 0) & (index < C)
        tl.device_assert(known | (inside == 0), "sortkd_kernels: a teacher index is outside [0, C)")
        tl.store(row + index, value, mask=inside & known & ((k <= first) | (index != label)))
    tl.debug_barrier()


@triton.jit
def mean_std_of_row(x, x_y, C, stride, T, LAYOUT: tl.constexpr, WORK: tl.constexpr, B: tl.constexpr):
    """Mean, ``1 / (eps + std)`` and std of a row, block by block: Chan's update, shifted by one of its values."""
    mean = tl.zeros_like(x_y)
    m2 = mean
    for start in range(0, C, B):
        classes = start + tl.arange(0, B)[None, None, :]
        held = classes < C
        d = tl.load(x + class_offset(classes, stride, LAYOUT), mask=held, other=0).to(WORK) - wide(x_y)
        d = tl.where(held, d, 0.0)
        n = tl.minimum(C - start, B).to(WORK)
        block_mean = total(d) / n
        centred = tl.where(held, d - wide(block_mean), 0.0)
        step = block_mean - mean
        m2 += total(centred * centred) + step * step * (start * n / (start + n))
        mean += step * (n / (start + n))
    scale, deviation = z_score(m2, C, T)
    return x_y + mean, scale, deviation


@triton.jit
def others(s_row, t_row, start, at_label, hidden_over, C, s_step, t_step, LAYOUT: tl.constexpr, T_LAYOUT: tl.constexpr,
           WORK: tl.constexpr, K: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """A tile of both sides, -inf at the label and, of the teacher, over ``hidden_over``; and, ``[1, L]``, the largest
    that the teacher has before that."""
    classes = start + first_classes(K, L) + tl.arange(0, L)[None, None, :]
    held = classes < C
    s = tl.load(s_row + class_offset(classes, s_step, LAYOUT), mask=held, other=-INFINITY).to(WORK)
    t = tl.load(t_row + class_offset(classes, t_step, T_LAYOUT), mask=held, other=-INFINITY).to(WORK)
    s = tl.where(classes == at_label, -INFINITY, s)
    t = tl.where(classes == at_label, -INFINITY, t)
    return s, tl.where(t > wide(hidden_over), -INFINITY, t), tl.max(t, PIECES)


@triton.jit
def in_range(sums, t_y, top, C, CE: tl.constexpr):
    """Whether sums relative to the label's logits keep their digits. What lies over the label is not in them yet.

    Far above C the logarithms of KD's sums would be large numbers with a small difference. The cross-entropy takes no
    such difference, and a student that is wrong by ten is no rarity.
    """
    low = 2.0**-80
    high = 256.0 * C
    z_s, z_t, z_1 = sums[0], sums[1], sums[3]
    fits = (z_s > low) & (z_s < high) & ((z_t > low) | (top > t_y)) & (z_t < high)
    if CE != 0:
        fits = fits & (z_1 > low) & (z_1 < 256.0 * high)
    return fits


@triton.jit
def class_step(stride, LAYOUT: tl.constexpr):
    """The stride from class to class, 1 for the layouts that have no other."""
    if LAYOUT >= NEIGHBOURS:
        return stride
    else:
        return stride * 0 + 1


RUNTIME_OF_LONG_ROWS = [*RUNTIME, "teacher_indices", "scratch", "C", "k_classes", "uniform", "capacity"]


@triton.jit(do_not_specialize=RUNTIME_OF_LONG_ROWS)
def sort_kd_long_rows(
    student, teacher, target, temperatures, grad_output, grad_student, grad_temperature, loss, kd, ce, rank, slots,
    tickets, counts, teacher_indices, scratch, dense,
    N: tl.int32, INNER: tl.int32, s_outer: tl.int64, s_inner: tl.int64, s_class: tl.int64, t_outer: tl.int64,
    t_inner: tl.int64, t_class: tl.int64, g_outer: tl.int64, g_inner: tl.int64, g_class: tl.int64,
    temperature_stride: tl.int32, grad_output_stride: tl.int32, ignore_index: tl.int64, group_bits: tl.int32,
    reduction: tl.int32, mean: tl.int32, parts: tl.int32, with_rank: tl.int32, with_grad: tl.int32, learned: tl.int32,
    correction: tl.int32, max_rank: tl.int32, decoupled: tl.int32, standardized: tl.int32,
    temperature: tl.float64, kd_weight: tl.float64, alpha: tl.float64, beta: tl.float64, ce_weight: tl.float64,
    C: tl.int32, k_classes: tl.int32, uniform: tl.int32, capacity: tl.int32,
    CE: tl.constexpr, GENERAL: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, WORK: tl.constexpr,
    LISTED: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Rows ``program, program + programs, ...``, one at a time.

    One with more than ``capacity`` classes above its label gets its rank only. LISTED takes the rows that an earlier
    launch has left so, those whose rank is over max_rank. A TOP_K teacher's row is written out in ``dense`` first.
    """
    C = C // ALIGN * ALIGN  # which the host knows it to be
    B: tl.constexpr = K * L
    STEP: tl.constexpr = B if LISTED else RUN
    T_LAYOUT: tl.constexpr = 0 if TOP_K else LAYOUT
    FIRST: tl.constexpr = 1 if GENERAL else 0
    program = tl.program_id(0)
    keys = scratch + program.to(tl.int64) * capacity * (3 if tl.float64 == WORK else 2)
    spare = keys + (2 if tl.float64 == WORK else 1) * capacity
    n = count_rows(target, counts, N, ignore_index, mean, WORK)
    tile = first_classes(K, L) + tl.arange(0, L)[None, None, :]
    for first in range(program, N, tl.num_programs(0) * SEARCHED):
        places = first + tl.arange(0, SEARCHED) * tl.num_programs(0)
        wanted = places < N
        if LISTED:
            wanted = wanted & (tl.load(rank + places, mask=wanted, other=0) > max_rank)
        for _ in range(tl.sum(wanted.to(tl.int32), 0)):
            place = tl.min(tl.where(wanted, places, N), 0)
            wanted = wanted & (places != place)
            rows = place + tl.arange(0, 1)
            label, counts_row = read_label(target, rows, rows < N, ignore_index, C)
            # A row that does not count holds no class.
            live = tl.sum(counts_row.to(tl.int32), 0) * C
            outer = place // INNER
            inner = place % INNER
            s_row = student + row_start(place, outer, inner, s_outer, s_inner, LAYOUT, ALIGN)
            if TOP_K:
                top = place.to(tl.int64) * k_classes
                t_row = dense + program.to(tl.int64) * C
                densify(
                    teacher + top, teacher_indices + top, label, k_classes, t_row, C, live, uniform, WORK, L
                )  # fmt: skip
            else:
                t_row = teacher + row_start(place, outer, inner, t_outer, t_inner, LAYOUT, ALIGN)
            s_step = class_step(s_class, LAYOUT)
            t_step = class_step(t_class, T_LAYOUT)
            at_label = wide(label)
            s_y = tl.load(s_row + label * s_step, mask=counts_row, other=0).to(WORK)
            t_y = tl.load(t_row + label * t_step, mask=counts_row, other=0).to(WORK)

            T = read_temperature(temperatures, temperature_stride, temperature, rows, counts_row, GENERAL, WORK)
            a_s = LOG2E / T
            a_t = a_s
            mean_s = s_y
            scale = tl.full(T.shape, 1.0, WORK)
            deviation = tl.zeros_like(T)
            if GENERAL:
                if standardized != 0:
                    mean_s, scale, deviation = mean_std_of_row(s_row, s_y, live, s_step, T, LAYOUT, WORK, L)
                    a_s = a_s * scale
                    _mean, t_scale, _deviation = mean_std_of_row(t_row, t_y, live, t_step, T, T_LAYOUT, WORK, L)
                    a_t = a_t * t_scale

            hidden_over = tl.where(correction != 0, t_y, INFINITY)
            lowest = tl.full([1, L], -INFINITY, WORK)
            zero = tl.zeros_like(lowest)
            m_s = finite_or_zero(s_y)
            m_t = finite_or_zero(t_y)
            top = t_y
            none = tl.zeros([1], WORK)
            row_sums = (none, none, none, none, none, none, none)
            again = live
            for to_maxima in range(FIRST, tl.where(live > 0, 2, 0)):  # a number that the compiler would not unroll
                if again > 0:
                    if to_maxima > 0:
                        largest_s = lowest
                        largest_t = lowest
                        for start in range(0, live, B):
                            s, t, _top = others(
                                s_row, t_row, start, at_label, hidden_over, C, s_step, t_step, LAYOUT, T_LAYOUT, WORK,
                                K, L,
                            )  # fmt: skip
                            largest_s = tl.maximum(largest_s, tl.max(s, PIECES))
                            largest_t = tl.maximum(largest_t, tl.max(t, PIECES))
                        m_s = tl.max(largest_s, 1)
                        m_t = tl.max(largest_t, 1)
                    sums = (zero, zero, zero, zero, zero, zero, zero)
                    largest_t = lowest
                    # A tile on its way while the one before is computed; the pass over the gradient would spill.
                    for start in tl.range(0, live, B, num_stages=2):
                        s, t, most = others(
                            s_row, t_row, start, at_label, hidden_over, C, s_step, t_step, LAYOUT, T_LAYOUT, WORK, K, L
                        )  # fmt: skip
                        block, _e = tile_sums(s, t, m_s, m_t, a_s, a_t, CE, GENERAL)
                        sums = added(sums, block)
                        largest_t = tl.maximum(largest_t, most)
                    row_sums = sum_lanes(sums, CE, GENERAL)
                    top = tl.max(largest_t, 1)
                    again = live * (1 - tl.min(in_range(row_sums, t_y, top, C, CE).to(tl.int32), 0))
            ranked = tl.zeros_like(live)
            if tl.max((top > t_y).to(tl.int32), 0) * (with_rank + correction) > 0:
                # A pass of its own: in the one above the keys would take the registers of the sums.
                for start in range(0, live, B):
                    classes = start + tile
                    held = classes < C
                    t = tl.load(t_row + class_offset(classes, t_step, T_LAYOUT), mask=held, other=-INFINITY).to(WORK)
                    above = t > wide(t_y)
                    marks = tl.sum(total(above.to(tl.int32)), 0)
                    if marks > 0:
                        if correction != 0:
                            collect(keys, t, classes, above, ranked, capacity)
                        ranked += marks
            if with_rank != 0:
                tl.store(rank + rows, ranked)
            if correction == 0:
                ranked = tl.zeros_like(ranked)
            last = rows < 0
            if ranked <= capacity:
                t_new = t_y
                order = keys
                if ranked > 0:
                    order = keys + put_in_order(keys, ranked, t_row, t_step, capacity, LISTED, WORK, STEP)
                    top_class = tl.load(order + tl.arange(0, 1)) & 0xFFFFFFFF
                    t_new = tl.load(t_row + top_class * t_step).to(WORK)
                for start in range(0, ranked, STEP):
                    classes, inside, t = corrected_above(
                        order, start, ranked, t_row, t_step, t_y, correction, WORK, STEP
                    )
                    s = tl.load(s_row + classes * s_step, mask=inside, other=-INFINITY).to(WORK)
                    keep(order, spare, start, ranked, classes, s, STEP)
                    new_t = tl.maximum(m_t, tl.max(t, 0))
                    row_sums = rebased(row_sums, m_t, new_t, a_t)
                    m_t = new_t
                    block, _e = tile_sums(s[None, None, :], t[None, None, :], m_s, m_t, a_s, a_t, CE, GENERAL)
                    # The student's sums have these classes already.
                    _z_s, z_t, cross, _z_1, _u_s, u_t, w = sum_lanes(block, CE, GENERAL)
                    row_sums = added(row_sums, (none, z_t, cross, none, none, u_t, w))

                factor = read_factor(grad_output, grad_output_stride, rows, counts_row, n, WORK)
                row_kd, row_ce, by_temperature, coefficients = finish_row(
                    row_sums, m_s, m_t, s_y, t_new, a_s, a_t, T, factor, mean_s, scale, deviation, C, decoupled != 0,
                    kd_weight, alpha, beta, ce_weight, CE, GENERAL,
                )  # fmt: skip
                last = store_row(
                    (row_kd, row_ce, by_temperature), rows, rows < N, counts_row, loss, kd, ce, grad_temperature,
                    slots, tickets, N, group_bits, reduction, parts, learned, kd_weight, ce_weight, CE, GENERAL, LAYOUT,
                )  # fmt: skip
                if with_grad != 0:
                    out = grad_student + row_start(place, outer, inner, g_outer, g_inner, LAYOUT, ALIGN)
                    g_step = class_step(g_class, LAYOUT)
                    m_s = finite_or_zero(m_s)
                    m_t = finite_or_zero(m_t)
                    blocks = tl.cdiv(C, B)
                    for i in range(blocks):
                        classes = (blocks - 1 - i) * B + tile
                        held = classes < live
                        s = tl.load(s_row + class_offset(classes, s_step, LAYOUT), mask=held, other=-INFINITY).to(WORK)
                        t = tl.load(t_row + class_offset(classes, t_step, T_LAYOUT), mask=held, other=-INFINITY)
                        _x_s, _x_t, e_s, e_t, e_1 = exponentials(s, t.to(WORK), m_s, m_t, a_s, a_t, CE)
                        g = gradient(coefficients, s, (e_s, e_t, e_1), CE, GENERAL)
                        g = rounded(g, grad_student.dtype.element_ty)
                        tl.store(out + class_offset(classes, g_step, LAYOUT), g, mask=classes < C)
                    # The label holds anything so far, the classes above it an uncorrected gradient: a mask on the
                    # values would have split each wide store of the loop above.
                    tl.debug_barrier()
                    g_y = rounded(coefficients[3], grad_student.dtype.element_ty)
                    tl.store(out + label * g_step, g_y, mask=counts_row)
                    for start in range(0, ranked, STEP):
                        classes, inside, t = corrected_above(
                            order, start, ranked, t_row, t_step, t_y, correction, WORK, STEP
                        )
                        s = kept(order, spare, start, ranked, WORK, STEP)[None, None, :]
                        _x_s, _x_t, e_s, e_t, e_1 = exponentials(s, t[None, None, :], m_s, m_t, a_s, a_t, CE)
                        g = gradient(coefficients, s, (e_s, e_t, e_1), CE, GENERAL)
                        g = rounded(g, grad_student.dtype.element_ty)
                        tl.store(out + (classes * g_step)[None, None, :], g, mask=inside[None, None, :])
            reduce_rows(last, rows, loss, kd, ce, slots, tickets, N, n, group_bits, parts, kd_weight, ce_weight, CE)
            # The program's next row overwrites its scratch.
            tl.debug_barrier()
