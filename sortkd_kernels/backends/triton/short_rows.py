# ruff: noqa: ANN001, ANN201, SIM102 - in a kernel annotations are types of the compiler, and a constant `if` stands alone
"""The loss of rows that fit in registers: every logit is read once, and every gradient written once."""

from __future__ import annotations

import triton
import triton.language as tl

from .row_io import (
    NEIGHBOURS,
    class_offset,
    count_rows,
    read_factor,
    read_label,
    read_temperature,
    reduce_rows,
    store_row,
    tile_start,
)
from .row_math import (
    INFINITY,
    LOG2E,
    PIECES,
    finish_row,
    first_classes,
    gradient,
    largest,
    rounded,
    sum_lanes,
    tile_sums,
    total,
    wide,
    z_score,
)

RUNTIME = [
    "target", "temperatures", "grad_output", "grad_temperature", "loss", "kd", "ce", "rank", "slots", "tickets",
    "counts", "N", "INNER", "s_outer", "s_inner", "s_class", "t_outer", "t_inner", "t_class", "g_outer", "g_inner",
    "g_class", "temperature_stride", "grad_output_stride", "ignore_index", "group_bits", "reduction", "mean", "parts",
    "with_rank", "with_grad", "learned", "correction", "max_rank", "decoupled", "standardized",
]  # fmt: skip


@triton.jit
def mean_std(x, x_y, held, C, T):
    """Mean, ``1 / (eps + std)`` and std of each row of a tile."""
    # Shifted by one of the row's own values, so that a constant row has a deviation of exactly 0.
    d = tl.where(held, x - wide(x_y), 0.0)
    mean = total(d) / C
    centred = tl.where(held, d - wide(mean), 0.0)
    scale, deviation = z_score(total(centred * centred), C, T)
    return x_y + mean, scale, deviation


@triton.jit
def rotate_top(t, pieces, lanes, t_y, rank, correction, max_rank):
    """The corrected tile without its labels, which are at -inf, and each label's new value.

    The sort correction rotates the top ``rank + 1`` values by one (`reference.py` has the proof). It walks up from the
    label's value: each class takes the value of the one before, so that what has been passed never lies above the
    present place again and needs no mark. Of equal values the higher class comes first.
    Rows of rank over max_rank come back wrong: they are another launch's.
    """
    top = t_y
    if correction == 2:
        value = largest(t)
        column = tl.min(tl.where(t == wide(value), pieces, INFINITY), PIECES)
        index = tl.where(rank > 0, tl.min(column + lanes, 1), -1.0)
        t = tl.where(pieces == wide(index) - lanes, wide(t_y), t)
        top = tl.where(rank > 0, value, t_y)
    else:
        place = tl.full(rank.shape, -1.0, tl.float32)
        for _ in range(tl.max(tl.where(rank <= max_rank, rank, 0), 0)):
            after = (t > wide(top)) | ((t == wide(top)) & (pieces < wide(place) - lanes))
            value = tl.min(tl.min(tl.where(after, t, INFINITY), PIECES), 1)
            # Rows of the tile that have come to their end stand still.
            more = value < INFINITY
            bound = tl.where(value > top, INFINITY, place)
            held = (t == wide(value)) & (pieces < wide(bound) - lanes)
            column = tl.max(tl.where(held, pieces, -INFINITY), PIECES)
            index = tl.where(more, tl.max(column + lanes, 1), -1.0)
            t = tl.where(pieces == wide(index) - lanes, wide(top), t)
            top = tl.where(more, value, top)
            place = tl.where(more, index, place)
    return t, top


@triton.jit(do_not_specialize=RUNTIME)
def sort_kd_short_rows(
    student, teacher, target, temperatures, grad_output, grad_student, grad_temperature, loss, kd, ce, rank, slots,
    tickets, counts,
    N: tl.int32, INNER: tl.int32, s_outer: tl.int64, s_inner: tl.int64, s_class: tl.int64, t_outer: tl.int64,
    t_inner: tl.int64, t_class: tl.int64, g_outer: tl.int64, g_inner: tl.int64, g_class: tl.int64,
    temperature_stride: tl.int32, grad_output_stride: tl.int32, ignore_index: tl.int64, group_bits: tl.int32,
    reduction: tl.int32, mean: tl.int32, parts: tl.int32, with_rank: tl.int32, with_grad: tl.int32, learned: tl.int32,
    correction: tl.int32, max_rank: tl.int32, decoupled: tl.int32, standardized: tl.int32,
    temperature: tl.float64, kd_weight: tl.float64, alpha: tl.float64, beta: tl.float64, ce_weight: tl.float64,
    CE: tl.constexpr, GENERAL: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, WORK: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """R rows a program. Those that the sort correction finds with a rank over max_rank get their rank only."""
    program = tl.program_id(0)
    if LAYOUT == NEIGHBOURS:
        # Never across the end of an inner dimension: within it the compiler sees that the rows are neighbours.
        blocks = tl.cdiv(INNER, R)
        outer = program // blocks
        inner = program % blocks * R + tl.arange(0, R)
        rows = outer * INNER + inner
        inside = inner < INNER
    else:
        rows = program * R + tl.arange(0, R)
        outer = rows // INNER
        inner = rows % INNER
        inside = rows < N
    classes = first_classes(K, L) + tl.arange(0, L)[None, None, :]
    held = classes < C
    if R > 1 or LAYOUT == NEIGHBOURS:
        held = held & wide(inside)
    # Rows that do not count are read too: a mask would have the logits wait for the labels.
    student = tile_start(student, rows, outer, inner, s_outer, s_inner, LAYOUT, ALIGN)
    teacher = tile_start(teacher, rows, outer, inner, t_outer, t_inner, LAYOUT, ALIGN)
    s = tl.load(student + class_offset(classes, s_class, LAYOUT), mask=held, other=-INFINITY).to(WORK)
    t = tl.load(teacher + class_offset(classes, t_class, LAYOUT), mask=held, other=-INFINITY).to(WORK)
    label, counts_row = read_label(target, rows, inside, ignore_index, C)
    at_label = wide(label)
    known = wide(counts_row)
    s_y = total(tl.load(student + class_offset(at_label, s_class, LAYOUT), mask=known, other=0).to(WORK))
    t_y = total(tl.load(teacher + class_offset(at_label, t_class, LAYOUT), mask=known, other=0).to(WORK))
    # Nothing ranks above the label of a row that does not count.
    t_y = tl.where(counts_row, t_y, INFINITY)
    n = count_rows(target, counts, N, ignore_index, mean, WORK)

    T = read_temperature(temperatures, temperature_stride, temperature, rows, counts_row, GENERAL, WORK)
    a_s = LOG2E / T
    a_t = a_s
    mean_s = s_y
    scale = tl.full(T.shape, 1.0, WORK)
    deviation = tl.zeros_like(T)
    if GENERAL:
        if standardized != 0:
            mean_s, scale, deviation = mean_std(s, s_y, held, C, T)
            a_s = a_s * scale
            _mean, t_scale, _deviation = mean_std(t, tl.where(counts_row, t_y, 0.0), held, C, T)
            a_t = a_t * t_scale

    # A class as the sum of two floats, of which the first is a constant of the code: of integers the compiler would
    # compute and hold the index of every class.
    pieces = first_classes(K, L).to(tl.float32)
    lanes = tl.arange(0, L).to(tl.float32)
    is_label = pieces == at_label.to(tl.float32) - lanes
    s = tl.where(is_label, -INFINITY, s)
    t = tl.where(is_label, -INFINITY, t)
    m_s = largest(s)
    m_t = largest(t)
    ranked = tl.zeros_like(label)
    done = inside
    # Where the teacher is right, which is nearly everywhere, a row pays one comparison for being corrected.
    if tl.max((m_t > t_y).to(tl.int32), 0) > 0:
        ranked = total((t > wide(t_y)).to(tl.int32))
        if correction != 0:
            done = inside & ((ranked <= max_rank) | (correction == 2))
            t, t_y = rotate_top(t, pieces, lanes, t_y, ranked, correction, max_rank)
            m_t = largest(t)

    sums, exponentials = tile_sums(s, t, m_s, m_t, a_s, a_t, CE, GENERAL)
    factor = read_factor(grad_output, grad_output_stride, rows, counts_row, n, WORK)
    row_kd, row_ce, by_temperature, coefficients = finish_row(
        sum_lanes(sums, CE, GENERAL), m_s, m_t, s_y, t_y, a_s, a_t, T, factor, mean_s, scale, deviation, C,
        decoupled != 0, kd_weight, alpha, beta, ce_weight, CE, GENERAL,
    )  # fmt: skip
    if with_rank != 0:
        tl.store(rank + rows, ranked, mask=inside)
    last = store_row(
        (row_kd, row_ce, by_temperature), rows, done, counts_row, loss, kd, ce, grad_temperature, slots, tickets, N,
        group_bits, reduction, parts, learned, kd_weight, ce_weight, CE, GENERAL, LAYOUT,
    )  # fmt: skip
    if with_grad != 0:
        g = gradient(coefficients, s, exponentials, CE, GENERAL)
        out = tile_start(grad_student, rows, outer, inner, g_outer, g_inner, LAYOUT, ALIGN)
        g = rounded(g, grad_student.dtype.element_ty)
        places = out + class_offset(classes, g_class, LAYOUT)
        tl.store(places, g, mask=(classes < C) & wide(done & counts_row))
        if tl.max((inside & (counts_row == 0)).to(tl.int32), 0) > 0:
            tl.store(places, tl.zeros_like(g), mask=(classes < C) & wide(inside & (counts_row == 0)))
        # The label's goes over what is there now: to select it would cost two instructions for every class.
        tl.debug_barrier()
        g_y = wide(rounded(coefficients[3], grad_student.dtype.element_ty))
        tl.store(out + class_offset(at_label, g_class, LAYOUT), g_y, mask=known & wide(done))
    reduce_rows(last, rows, loss, kd, ce, slots, tickets, N, n, group_bits, parts, kd_weight, ce_weight, CE)
