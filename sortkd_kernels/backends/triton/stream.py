# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The loss of rows that do not fit on chip, and of rows whose label ranks too low for `tile.py`.

A row streams by twice: once for its sums and the classes above its label, once for its gradient (and once before, for
its standard deviation). The classes above the label are kept out of the first pass and join the sums afterwards, in
order and corrected, so nothing is ever subtracted from a sum. The gradient may lie over the student: what the last step
needs of a logit that the step before has overwritten is kept beside the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dense import densify
from .epilogue import finish_row, gradient
from .order import collect, corrected_above, keep, kept, put_in_order
from .rows import aligned, class_offset, leave, read_factor, read_label, read_temperature, rounded, row_offset, value_at
from .sums import INFINITY, LOG2E, exponentials, finite_or_zero, merged, no_sums, tile_sums
from .terms import z_score


@triton.jit
def spread_of_row(x, x_y, C, stride_class, T, WORK: tl.constexpr, B: tl.constexpr):
    """Mean, ``1 / (eps + std)`` and std of a row, block by block: Chan's update, shifted by one of its values."""
    mean = tl.zeros_like(x_y)
    m2 = mean
    for start in range(0, C, B):
        classes = start + tl.arange(0, B)[None, :]
        held = classes < C
        d = tl.load(x + class_offset(classes, stride_class), mask=held, other=0).to(WORK) - x_y[:, None]
        d = tl.where(held, d, 0.0)
        n = tl.minimum(C - start, B).to(WORK)
        block_mean = tl.sum(d, 1) / n
        centred = tl.where(held, d - block_mean[:, None], 0.0)
        step = block_mean - mean
        m2 += tl.sum(centred * centred, 1) + step * step * (start * n / (start + n))
        mean += step * (n / (start + n))
    scale, deviation = z_score(m2, C, T)
    return x_y + mean, scale, deviation


@triton.jit(do_not_specialize=["N", "ignore_index", "K", "first_row"])
def sort_kd_stream(
    student, teacher, target, temperatures, grad_loss, count,
    kd_rows, ce_rows, loss_rows, rank_rows, grad_student, grad_temperature,
    N, C, INNER, student_outer, student_inner, student_class, teacher_outer, teacher_inner, teacher_class,
    grad_outer, grad_inner, grad_class, temperature_stride, grad_loss_stride, ignore_index,
    temperature: tl.float64, kd_weight: tl.float64, alpha: tl.float64, beta: tl.float64, ce_weight: tl.float64,
    listed, tally, scratch, capacity, teacher_indices, dense, K, first_row,
    CORRECTION: tl.constexpr, DECOUPLED: tl.constexpr, STANDARDIZE: tl.constexpr, LEARNED: tl.constexpr,
    CE: tl.constexpr, POWER: tl.constexpr, ALIGN: tl.constexpr, WORK: tl.constexpr,
    LEFT: tl.constexpr, MERGE: tl.constexpr, BUFFERS: tl.constexpr, STRIDE_ROWS: tl.constexpr, UNIFORM: tl.constexpr,
    RUN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One row at a time, B classes at a time.

    Every row; one with more than ``capacity`` classes above its label gets its rank only and is ``listed``. Or LEFT:
    the rows that an earlier launch has listed, ``tally`` of them. With ``teacher_indices`` the teacher is a top-K one,
    written out in ``dense``.
    """
    C = aligned(C, ALIGN)
    program = tl.program_id(0)
    keys = scratch + program.to(tl.int64) * capacity * BUFFERS
    spare = keys + (BUFFERS - 1) * capacity
    begin = first_row + program
    end = begin + 1
    step = 1
    if STRIDE_ROWS:
        # Scratch is a program's, so programs stride over the rows where a row's scratch is large. Only there: inside a
        # loop the compiler keeps the sort's addresses in registers from row to row, which halves the occupancy.
        end = N
        step = tl.num_programs(0)
    if LEFT:
        end = tl.load(tally)
    for place in range(begin, end, step):
        rows = place + tl.arange(0, 1)
        if LEFT:
            rows = tl.load(listed + rows)
        outer = rows // INNER
        inner = rows % INNER
        label, counts = read_label(target, rows, rows < N, ignore_index, C)
        T = read_temperature(temperatures, temperature_stride, temperature, rows, counts, WORK)
        # A row that does not count holds no class.
        live = tl.sum(counts.to(tl.int32), 0) * C
        s_row = student + row_offset(outer, inner, student_outer, student_inner, ALIGN)[:, None]
        if teacher_indices is None:
            t_row = teacher + row_offset(outer, inner, teacher_outer, teacher_inner, ALIGN)[:, None]
            t_class = teacher_class
        else:
            top = row_offset(outer, inner, teacher_outer, teacher_inner, 1)[:, None]
            t_row = dense + program.to(tl.int64) * C + tl.zeros([1, 1], tl.int32)
            t_class = 1
            densify(teacher + top, teacher_indices + top, teacher_class, K, t_row, C, live, UNIFORM, WORK, B)
        s_y = value_at(s_row, label, student_class, counts, WORK)
        t_y = value_at(t_row, label, t_class, counts, WORK)
        at_label = label[:, None]

        a_s = LOG2E / T
        a_t = a_s
        mean = s_y
        scale = T
        deviation = T
        if STANDARDIZE:
            mean, scale, deviation = spread_of_row(s_row, s_y, live, student_class, T, WORK, B)
            a_s = a_s * scale
            _mean, t_scale, _deviation = spread_of_row(t_row, t_y, live, t_class, T, WORK, B)
            a_t = a_t * t_scale

        sums = no_sums(T)
        rank = tl.zeros_like(live)
        for start in range(0, live, B):
            classes = start + tl.arange(0, B)[None, :]
            held = classes < C
            s = tl.load(s_row + class_offset(classes, student_class), mask=held, other=-INFINITY).to(WORK)
            t = tl.load(t_row + class_offset(classes, t_class), mask=held, other=-INFINITY).to(WORK)
            s = tl.where(classes == at_label, -INFINITY, s)
            t = tl.where(classes == at_label, -INFINITY, t)
            m_t = tl.max(t, 1)
            found = tl.zeros_like(rank)
            # Where the teacher is right a block pays one comparison for being corrected.
            if tl.sum((m_t > t_y).to(tl.int32), 0) > 0:
                above = t > t_y[:, None]
                found = tl.sum(tl.sum(above.to(tl.int32), 1), 0)
                if CORRECTION != 0:
                    collect(keys, t, classes, above, rank, capacity)
                    s = tl.where(above, -INFINITY, s)
                    t = tl.where(above, -INFINITY, t)
                    m_t = tl.max(t, 1)
            block, _e_s, _e_t, _e_1 = tile_sums(s, t, tl.max(s, 1), m_t, a_s, a_t, CE, POWER, STANDARDIZE or LEARNED)
            sums = merged(sums, block, a_s, a_t)
            rank += found
        if not LEFT:
            tl.store(rank_rows + rows, rank)

        ranked = rank
        if CORRECTION == 0:
            ranked = tl.zeros_like(rank)
        if listed is not None and not LEFT:  # noqa: SIM102 - this one is the compiler's to decide, the next the device's
            if ranked > capacity:
                leave(rows, rows >= 0, listed, tally)
        if ranked <= capacity:
            t_new = t_y
            order = keys
            if ranked > 0:
                order = keys + put_in_order(keys, ranked, t_row, t_class, capacity, RUN, MERGE, WORK)
                first = tl.load(order + tl.arange(0, 1)) & 0xFFFFFFFF
                t_new = value_at(t_row, first, t_class, counts, WORK)
            for start in range(0, ranked, RUN):
                classes, inside, t = corrected_above(order, start, ranked, t_row, t_class, t_y, CORRECTION, WORK, RUN)
                s = tl.load(s_row + class_offset(classes, student_class), mask=inside, other=-INFINITY).to(WORK)
                keep(order, spare, start, ranked, classes, s, RUN)
                block, _e_s, _e_t, _e_1 = tile_sums(
                    s, t, tl.max(s, 1), tl.max(t, 1), a_s, a_t, CE, POWER, STANDARDIZE or LEARNED
                )
                sums = merged(sums, block, a_s, a_t)

            factor = read_factor(grad_loss, grad_loss_stride, count, rows, counts, WORK)
            kd, ce, loss, by_temperature, coefficients = finish_row(
                sums, s_y, t_new, a_s, a_t, T, mean, scale, deviation, factor, C, kd_weight, alpha, beta, ce_weight,
                DECOUPLED, STANDARDIZE, LEARNED, CE,
            )  # fmt: skip
            tl.store(kd_rows + rows, kd)
            if CE:
                tl.store(ce_rows + rows, ce)
            if loss_rows is not None:
                tl.store(loss_rows + rows, loss)
            if LEARNED:
                tl.store(grad_temperature + rows, by_temperature)

            if grad_student is not None:
                m_s = finite_or_zero(sums[0])
                m_t = finite_or_zero(sums[1])
                out = grad_student + row_offset(outer, inner, grad_outer, grad_inner, ALIGN)[:, None]
                for start in range(0, C, B):
                    classes = start + tl.arange(0, B)[None, :]
                    held = classes < live
                    s = tl.load(s_row + class_offset(classes, student_class), mask=held, other=-INFINITY).to(WORK)
                    t = tl.load(t_row + class_offset(classes, t_class), mask=held, other=-INFINITY).to(WORK)
                    _x_s, _x_t, e_s, e_t, e_1 = exponentials(s, t, m_s, m_t, a_s, a_t, CE, POWER)
                    g = gradient(coefficients, s, e_s, e_t, e_1, CE, STANDARDIZE)
                    g = rounded(g, grad_student.dtype.element_ty)
                    tl.store(out + class_offset(classes, grad_class), g, mask=classes < C)
                # The label holds anything so far, the classes above it an uncorrected gradient: a mask on the values
                # would have split each 128-bit store of the loop above into scalars.
                tl.debug_barrier()
                g_y = rounded(coefficients[3], grad_student.dtype.element_ty)
                tl.store(out + class_offset(at_label, grad_class), g_y[:, None], mask=counts[:, None])
                for start in range(0, ranked, RUN):
                    classes, inside, t = corrected_above(
                        order, start, ranked, t_row, t_class, t_y, CORRECTION, WORK, RUN
                    )
                    s = kept(order, spare, start, ranked, WORK, RUN)
                    _x_s, _x_t, e_s, e_t, e_1 = exponentials(s, t, m_s, m_t, a_s, a_t, CE, POWER)
                    g = gradient(coefficients, s, e_s, e_t, e_1, CE, STANDARDIZE)
                    g = rounded(g, grad_student.dtype.element_ty)
                    tl.store(out + class_offset(classes, grad_class), g, mask=inside)
        # The program's next row overwrites its scratch.
        tl.debug_barrier()
