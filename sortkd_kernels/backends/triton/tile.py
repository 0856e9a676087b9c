# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The loss of rows that fit on chip: every logit is read once, and every gradient written once."""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import finish_row, gradient
from .rotate import correct_in_registers
from .rows import aligned, class_offset, leave, read_factor, read_label, read_temperature, rounded, row_offset, value_at
from .sums import INFINITY, LOG2E, tile_sums
from .terms import z_score


@triton.jit
def spread(x, x_y, classes, C, T):
    """Mean, ``1 / (eps + std)`` and std of each row of a tile."""
    # Shifted by one of the row's own values, so that a constant row has a deviation of exactly 0.
    d = tl.where(classes, x - x_y[:, None], 0.0)
    mean = tl.sum(d, 1) / C
    centred = tl.where(classes, d - mean[:, None], 0.0)
    scale, deviation = z_score(tl.sum(centred * centred, 1), C, T)
    return x_y + mean, scale, deviation


@triton.jit(do_not_specialize=["N", "ignore_index", "nought"])
def sort_kd_tile(
    student, teacher, target, temperatures, grad_loss, count,
    kd_rows, ce_rows, loss_rows, rank_rows, grad_student, grad_temperature,
    N, C, INNER, student_outer, student_inner, student_class, teacher_outer, teacher_inner, teacher_class,
    grad_outer, grad_inner, grad_class, temperature_stride, grad_loss_stride, ignore_index,
    temperature: tl.float64, kd_weight: tl.float64, alpha: tl.float64, beta: tl.float64, ce_weight: tl.float64,
    listed, tally, nought,
    CORRECTION: tl.constexpr, DECOUPLED: tl.constexpr, STANDARDIZE: tl.constexpr, LEARNED: tl.constexpr,
    CE: tl.constexpr, POWER: tl.constexpr, LIMIT: tl.constexpr, ALIGN: tl.constexpr, WORK: tl.constexpr,
    NEIGHBOURS: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """R rows of up to B classes a program; NEIGHBOURS where a class's values of neighbouring rows are neighbours.

    Rows that the sort correction finds with a rank over LIMIT get their rank only and are listed for `sort_kd_stream`,
    if there can be any: ``listed`` is not None.
    """
    program = tl.program_id(0)
    if NEIGHBOURS:
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
    label, counts = read_label(target, rows, inside, ignore_index, C)
    T = read_temperature(temperatures, temperature_stride, temperature, rows, counts, WORK)
    factor = read_factor(grad_loss, grad_loss_stride, count, rows, counts, WORK)

    classes = tl.arange(0, B)[None, :]
    held = counts[:, None] & (classes < aligned(C, ALIGN))
    student += row_offset(outer, inner, student_outer, student_inner, ALIGN)[:, None]
    teacher += row_offset(outer, inner, teacher_outer, teacher_inner, ALIGN)[:, None]
    if NEIGHBOURS:
        # A 0 that the compiler cannot know hides the alignment: it would give a lane 4 or 8 rows to fill 128-bit loads,
        # and with them 4 or 8 times the arithmetic of a row's end. A lane with one row reads as coalesced.
        student += nought
        teacher += nought
    s = tl.load(student + class_offset(classes, student_class), mask=held, other=-INFINITY).to(WORK)
    t = tl.load(teacher + class_offset(classes, teacher_class), mask=held, other=-INFINITY).to(WORK)
    at_label = label[:, None]
    s_y = value_at(student, label, student_class, counts, WORK)
    t_y = value_at(teacher, label, teacher_class, counts, WORK)

    a_s = LOG2E / T
    a_t = a_s
    mean = s_y
    scale = T
    deviation = T
    if STANDARDIZE:
        mean, scale, deviation = spread(s, s_y, held, C, T)
        a_s = a_s * scale
        _mean, t_scale, _deviation = spread(t, t_y, held, C, T)
        a_t = a_t * t_scale

    s = tl.where(classes == at_label, -INFINITY, s)
    t = tl.where(classes == at_label, -INFINITY, t)
    m_s = tl.max(s, 1)
    m_t = tl.max(t, 1)
    rank = tl.zeros_like(label)
    done = inside
    # Where the teacher is right, which is nearly everywhere, a row pays one comparison for being corrected.
    if tl.max((m_t > t_y).to(tl.int32), 0) > 0:
        rank = tl.sum((t > t_y[:, None]).to(tl.int32), 1)
        if listed is not None:
            done = inside & (rank <= LIMIT)
            leave(rows, inside & (rank > LIMIT), listed, tally)
        if CORRECTION != 0:
            t, t_y = correct_in_registers(t, classes, rank, t_y, CORRECTION, LIMIT)
            m_t = tl.max(t, 1)

    sums, e_s, e_t, e_1 = tile_sums(s, t, m_s, m_t, a_s, a_t, CE, POWER, STANDARDIZE or LEARNED)
    kd, ce, loss, by_temperature, coefficients = finish_row(
        sums, s_y, t_y, a_s, a_t, T, mean, scale, deviation, factor, C, kd_weight, alpha, beta, ce_weight,
        DECOUPLED, STANDARDIZE, LEARNED, CE,
    )  # fmt: skip

    tl.store(rank_rows + rows, rank, mask=inside)
    tl.store(kd_rows + rows, kd, mask=done)
    if CE:
        tl.store(ce_rows + rows, ce, mask=done)
    if loss_rows is not None:
        tl.store(loss_rows + rows, loss, mask=done)
    if LEARNED:
        tl.store(grad_temperature + rows, by_temperature, mask=done)
    if grad_student is not None:
        g = gradient(coefficients, s, e_s, e_t, e_1, CE, STANDARDIZE)
        out = grad_student + row_offset(outer, inner, grad_outer, grad_inner, ALIGN)[:, None]
        if NEIGHBOURS:
            out += nought
        g = rounded(g, grad_student.dtype.element_ty)
        tl.store(out + class_offset(classes, grad_class), g, mask=done[:, None] & (classes < aligned(C, ALIGN)))
        # The label's goes over what is there now: to select it would cost two instructions for every class.
        tl.debug_barrier()
        g_y = rounded(coefficients[3], grad_student.dtype.element_ty)
        tl.store(out + class_offset(at_label, grad_class), g_y[:, None], mask=(done & counts)[:, None])
