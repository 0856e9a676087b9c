# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The sums of a row: everything that the losses and their gradients need to know about the classes without the label.

Leaving the label out keeps its log odds exact when it holds nearly all of the probability, where ``1 - q_y`` taken from
a full softmax is rounding noise; KD and DKD then come from the same sums (KD = TCKD + (1 - p_y) NCKD).

Logits are held in units of bits relative to the largest: ``x = (logit - m) * a`` with ``a = log2(e) / T``, so that an
exponential is one ``exp2``. A set of sums is the tuple
``(m_s, m_t, z_s, z_t, cross, z_1, u_s, u_t, w)``: maxima (-inf for the empty set), ``sum e_s``, ``sum e_t``,
``sum e_t (x_t - x_s)``, ``sum e_1`` (temperature 1), ``sum e_s x_s``, ``sum e_t x_s``, ``sum e_t x_t (x_t - x_s)``.

A class that does not belong to a set has both logits at -inf. Masks would say the same, but those of a tile do not fit
in the seven predicate registers of a lane, and moving them about is a third of the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def finite_or_zero(m):
    """A maximum to subtract: 0 for the empty set, since ``-inf - -inf`` is NaN."""
    return tl.where(m == -INFINITY, 0.0, m)


@triton.jit
def exponentials(s, t, m_s, m_t, a_s, a_t, CE: tl.constexpr, POWER: tl.constexpr):
    """``(x_s, x_t, e_s, e_t, e_1)`` of a tile."""
    d_s = s - m_s[:, None]
    x_s = d_s * a_s[:, None]
    e_s = tl.exp2(x_s)
    e_1 = e_s
    if CE:
        # exp(s) = exp(s / T) ** T: where T is 1, 2 or 4 the cross-entropy costs no third exponential.
        if POWER == 0:
            e_1 = tl.exp2(d_s * LOG2E)
        if POWER == 2:
            e_1 = e_s * e_s
        if POWER == 4:
            e_1 = e_s * e_s
            e_1 = e_1 * e_1
    x_t = (t - m_t[:, None]) * a_t[:, None]
    e_t = tl.exp2(x_t)
    return x_s, x_t, e_s, e_t, e_1


@triton.jit
def tile_sums(s, t, m_s, m_t, a_s, a_t, CE: tl.constexpr, POWER: tl.constexpr, MOMENTS: tl.constexpr):
    """The sums over the classes of a tile ``[R, B]`` with maxima m_s and m_t, and its exponentials."""
    x_s, x_t, e_s, e_t, e_1 = exponentials(s, t, finite_or_zero(m_s), finite_or_zero(m_t), a_s, a_t, CE, POWER)
    z_s = tl.sum(e_s, 1)
    z_t = tl.sum(e_t, 1)
    # A class that the teacher excludes counts 0, also where the student excludes it too (0 * inf).
    gap = tl.where(e_t == 0, 0.0, x_t - x_s)
    cross = tl.sum(e_t * gap, 1)
    z_1 = z_s
    u_s = tl.zeros_like(z_s)
    u_t = u_s
    w = u_s
    if CE:
        z_1 = tl.sum(e_1, 1)
    if MOMENTS:
        u_s = tl.sum(tl.where(e_s == 0, 0.0, e_s * x_s), 1)
        u_t = tl.sum(tl.where(e_t == 0, 0.0, e_t * x_s), 1)
        w = tl.sum(tl.where(e_t == 0, 0.0, e_t * x_t * gap), 1)
    return (m_s, m_t, z_s, z_t, cross, z_1, u_s, u_t, w), e_s, e_t, e_1


@triton.jit
def no_sums(like):
    """The sums of the empty set."""
    zero = tl.zeros_like(like)
    least = zero - INFINITY
    return (least, least, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def rebased(sums, m_s, m_t, a_s, a_t):
    """The same sums relative to larger maxima."""
    d_s = tl.where(sums[0] == -INFINITY, 0.0, sums[0] - m_s)
    d_t = tl.where(sums[1] == -INFINITY, 0.0, sums[1] - m_t)
    x_s = d_s * a_s
    x_t = d_t * a_t
    f_s = tl.exp2(x_s)
    f_t = tl.exp2(x_t)
    z_s, z_t, cross, u_t = sums[2], sums[3], sums[4], sums[7]
    moved = cross + z_t * (x_t - x_s)
    u_moved = u_t + z_t * x_s
    w = sums[8] + x_t * cross + (x_t - x_s) * (cross + u_t) + x_t * (x_t - x_s) * z_t
    # Sums that vanish beside the others count 0 even where they are infinite.
    gone = f_t == 0
    return (
        m_s,
        m_t,
        z_s * f_s,
        z_t * f_t,
        tl.where(gone, 0.0, moved * f_t),
        sums[5] * tl.exp2(d_s * LOG2E),
        (sums[6] + z_s * x_s) * f_s,
        tl.where(gone, 0.0, u_moved * f_t),
        tl.where(gone, 0.0, w * f_t),
    )


@triton.jit
def merged(p, q, a_s, a_t):
    """The sums of two disjoint sets of classes together."""
    m_s = tl.maximum(p[0], q[0])
    m_t = tl.maximum(p[1], q[1])
    p = rebased(p, m_s, m_t, a_s, a_t)
    q = rebased(q, m_s, m_t, a_s, a_t)
    return (
        m_s, m_t, p[2] + q[2], p[3] + q[3], p[4] + q[4], p[5] + q[5], p[6] + q[6], p[7] + q[7], p[8] + q[8],
    )  # fmt: skip
