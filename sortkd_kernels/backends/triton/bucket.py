# ruff: noqa: ANN001, ANN201 - in a kernel annotations are types of the compiler, and a constant `if` stands alone
"""The loss of a top-k teacher whose absent classes are one, the bucket: the row as k + 2 classes (`reference.py`).

The teacher comes as these k + 2, corrected. With R the logsumexp of the student's logits in the bucket and g the
gradient by the k + 2, a class in the bucket has the gradient ``g_R exp(s - R)``. The cross-entropy is that of all C.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_io import loss_of, read_factor, read_label, read_temperature
from .row_math import (
    INFINITY,
    LOG2E,
    finish_row,
    finite_or_zero,
    gradient,
    label_probability,
    largest,
    rounded,
    sum_lanes,
    tile_sums,
    total,
    wide,
)


@triton.jit
def log_sum(a, b):
    """``log(exp(a) + exp(b))``, -inf where both are."""
    top = finite_or_zero(tl.maximum(a, b))
    return top + tl.log(tl.exp2((a - top) * LOG2E) + tl.exp2((b - top) * LOG2E))


@triton.jit
def ratio(a, b):
    """``exp(a - b)``, 0 for a ``b`` of -inf."""
    return tl.where(b == -INFINITY, 0.0, tl.exp2((a - b) * LOG2E))


@triton.jit(
    do_not_specialize=[
        "teacher", "indices", "target", "temperatures", "grad_output", "grad_temperature", "loss", "kd", "ce", "rank",
        "N", "C", "k", "temperature_stride", "grad_output_stride", "ignore_index", "parts", "with_grad", "learned",
        "apart",
    ]
)  # fmt: skip
def sort_kd_bucket(
    student, teacher, indices, target, temperatures, grad_output, grad_student, grad_temperature, loss, kd, ce, rank,
    marks, N: tl.int32, C: tl.int32, k: tl.int32, temperature_stride: tl.int32, grad_output_stride: tl.int32,
    ignore_index: tl.int64, parts: tl.int32, with_grad: tl.int32, learned: tl.int32, apart: tl.int32,
    temperature: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    WORK: tl.constexpr, K: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows ``program, program + programs, ...``. ``marks[:C]`` of a program are 0 before and after each row."""
    C = C // ALIGN * ALIGN  # C, and the compiler knows what divides it
    program = tl.program_id(0)
    marks += program.to(tl.int64) * C
    places = tl.arange(0, K)[None, None, :]
    block = tl.arange(0, B)[None, None, :]
    for row in range(program, N, tl.num_programs(0)):
        rows = row + tl.arange(0, 1)
        label, counts = read_label(target, rows, rows < N, ignore_index, C)
        live = tl.sum(counts.to(tl.int32), 0) * C
        place = tl.zeros([], tl.int64) + row
        s_row = student + place * C
        held = (places < k) & wide(counts)
        classes = tl.load(indices + place * k + places, mask=held, other=0).to(tl.int32)
        known = (classes >= 0) & (classes < C)
        tl.device_assert(known | (held == 0), "sortkd_kernels: a teacher index is outside [0, C)")
        held = held & known
        is_label = held & (classes == wide(label))
        at_label = tl.min(tl.min(tl.min(tl.where(is_label, places, k), 2), 1), 0)
        s = tl.load(s_row + classes, mask=held & ((is_label == 0) | (places == at_label)), other=-INFINITY).to(WORK)
        s_y = tl.load(s_row + label, mask=counts, other=0).to(WORK)
        one = tl.full([1, 1, K], 1, tl.int8)
        tl.store(marks + classes, one, mask=held)
        tl.store(marks + label, tl.full([1], 1, tl.int8), mask=counts)
        tl.debug_barrier()

        # The classes outside: what is above a lane's maximum moves its sum.
        top = tl.full([1, 1, B], -INFINITY, WORK)
        rest = tl.zeros([1, 1, B], WORK)
        for start in range(0, live, B):
            c = start + block
            x = tl.load(s_row + c, mask=c < C, other=-INFINITY).to(WORK)
            x = tl.where(tl.load(marks + c, mask=c < C, other=1) != 0, -INFINITY, x)
            new = tl.maximum(top, x)
            base = finite_or_zero(new)
            rest = rest * tl.exp2((top - base) * LOG2E) + tl.exp2((x - base) * LOG2E)
            top = new
        reference = finite_or_zero(largest(top))
        moved = tl.where(rest == 0, 0.0, rest * tl.exp2((finite_or_zero(top) - wide(reference)) * LOG2E))
        bucket = reference + tl.log(total(moved))
        tl.debug_barrier()
        tl.store(marks + classes, tl.zeros([1, 1, K], tl.int8), mask=held)
        tl.store(marks + label, tl.zeros([1], tl.int8), mask=counts)

        of_k = tl.where(places == at_label, -INFINITY, s)
        top_k = finite_or_zero(largest(of_k))
        others = log_sum(bucket, top_k + tl.log(total(tl.exp2((of_k - wide(top_k)) * LOG2E))))
        outside = at_label == k
        if outside & (apart == 0):
            bucket = log_sum(bucket, s_y)
            at_label = at_label + 1
        own = tl.where(at_label == k, s_y, -INFINITY)
        s = tl.where(places == k, wide(own), tl.where(places == k + 1, wide(bucket), s))
        t = tl.load(
            teacher + place * (k + 2) + places, mask=(places < k + 2) & wide(counts), other=-INFINITY
        ).to(WORK)  # fmt: skip
        small_y = total(tl.where(places == at_label, s, 0.0))
        t_y = total(tl.where(places == at_label, t, 0.0))
        s_others = tl.where(places == at_label, -INFINITY, s)
        t_others = tl.where(places == at_label, -INFINITY, t)

        T = read_temperature(temperatures, temperature_stride, temperature, rows, counts, True, WORK)
        a = LOG2E / T
        m_s = largest(s_others)
        m_t = largest(t_others)
        sums, exponentials = tile_sums(s_others, t_others, m_s, m_t, a, a, 0, True)
        n = tl.full([], 1, tl.int32).to(WORK)
        factor = read_factor(grad_output, grad_output_stride, rows, counts, n, WORK)
        none = tl.zeros_like(T)
        row_kd, _ce, by_temperature, coefficients = finish_row(
            sum_lanes(sums, 0, True), m_s, m_t, small_y, t_y, a, a, T, factor, none, none + 1.0, none, k + 2, k < 0,
            kd_weight, 1.0, 0.0, ce_weight, 0, True,
        )  # fmt: skip
        odds = tl.where(s_y == INFINITY, float("nan"), s_y - others)
        _q, rest_q, log_q, _log_rest = label_probability(odds)
        row_kd = tl.where(counts, row_kd, 0.0)
        row_ce = tl.where(counts, -log_q, 0.0)
        tl.store(loss + rows, loss_of(row_kd, row_ce, kd_weight, ce_weight))
        if parts != 0:
            tl.store(kd + rows, row_kd)
            tl.store(ce + rows, row_ce)
            # The teacher's side, which is not here, knows it.
            tl.store(rank + rows, tl.zeros([1], tl.int32))
        if learned != 0:
            tl.store(grad_temperature + rows, tl.where(counts, by_temperature, 0.0))
        if with_grad != 0:
            out = grad_student + place * C
            on_ce = none
            if ce_weight != 0:
                on_ce = factor * tl.full(T.shape, ce_weight, WORK) * rest_q
            g = gradient(coefficients, s_others, exponentials, 0, True)
            g = tl.where(places == at_label, wide(coefficients[3]), g)
            of_bucket = total(tl.where(places == k + 1, g, 0.0))
            g_y = total(tl.where(places == at_label, g, 0.0))
            if outside & (apart == 0):
                g_y = of_bucket * ratio(s_y, bucket)
            scale = of_bucket * ratio(reference, bucket) + on_ce * ratio(reference, others)
            for start in range(0, C, B):
                c = start + block
                x = tl.load(s_row + c, mask=c < live, other=-INFINITY).to(WORK)
                x = tl.where(wide(counts), tl.exp2((x - wide(reference)) * LOG2E) * wide(scale), 0.0)
                tl.store(out + c, rounded(x, grad_student.dtype.element_ty), mask=c < C)
            tl.debug_barrier()
            g += wide(on_ce) * ratio(s_others, wide(others))
            tl.store(out + classes, rounded(g, grad_student.dtype.element_ty), mask=held & (is_label == 0))
            tl.store(out + label, rounded(g_y - on_ce, grad_student.dtype.element_ty), mask=counts)
        # The next row marks anew.
        tl.debug_barrier()
