# ruff: noqa: ANN001, ANN201 - in a kernel annotations are types of the compiler, and a constant `if` stands alone
"""The arithmetic of a row: its sums, its loss terms, the coefficients of its gradient.

A tile is of R rows, and of each K pieces of L classes side by side. The lanes are spread over L and then over R: each
holds the same places of every piece, so that a sum over the pieces crosses none. What a row has once is ``[R]``.

Every sum leaves the label out. That keeps its log odds exact where it holds nearly all of the probability, where
``1 - q_y`` taken from a full softmax is rounding noise, and KD and DKD come from the same sums
(KD = TCKD + (1 - p_y) NCKD). Logits are held in bits below the largest, ``x = (logit - m) * a`` with
``a = log2(e) / T``, so that an exponential is one ``exp2``. The sums are the tuple
``(z_s, z_t, cross, z_1, u_s, u_t, w)``: ``sum e_s``, ``sum e_t``, ``sum e_t (x_t - x_s)``, ``sum e_1`` (temperature 1)
and, GENERAL only, ``sum e_s x_s``, ``sum e_t x_s``, ``sum e_t x_t (x_t - x_s)``.

A class that is left out has both logits at -inf. Masks would say the same, but those of a tile do not fit in the seven
predicate registers of a lane.

GENERAL rows have a z-score, a temperature in a tensor, or doubles; all others take the shorter way.
CE is the way to the cross-entropy's exponential: 0 none, 1, 2 or 4 that power of the student's own, -1 one more
exponential.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The axis of the pieces, [K, R, L] or [R, K, L]: the one of the two outer axes that this compiler gives lanes to last.
PIECES = tl.constexpr(0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 1)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in another float dtype, rounded to nearest as the hardware does."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter would truncate. After this the value is a bfloat16's already.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def wide(x):
    """A value of each row, beside a tile."""
    return x[None, :, None] if PIECES == 0 else x[:, None, None]


@triton.jit
def first_classes(K: tl.constexpr, L: tl.constexpr):
    """The first class of each piece of a tile."""
    k = tl.arange(0, K) * L
    return k[:, None, None] if PIECES == 0 else k[None, :, None]


@triton.jit
def total(x):
    """The sum of each row of a tile; within a lane first."""
    return tl.sum(tl.sum(x, PIECES), 1)


@triton.jit
def largest(x):
    """The maximum of each row of a tile."""
    return tl.max(tl.max(x, PIECES), 1)


@triton.jit
def finite_or_zero(m):
    """A maximum to subtract: 0 for the empty set, since ``-inf - -inf`` is NaN."""
    return tl.where(m == -INFINITY, 0.0, m)


@triton.jit
def inverse(z):
    """1/z, or 0 for the sum over no class."""
    return tl.where(z == 0, 0.0, 1.0 / z)


@triton.jit
def exponentials(s, t, m_s, m_t, a_s, a_t, CE: tl.constexpr):
    """``(x_s, x_t, e_s, e_t, e_1)`` of a tile relative to finite maxima."""
    d_s = s - wide(m_s)
    x_s = d_s * wide(a_s)
    e_s = tl.exp2(x_s)
    e_1 = e_s
    # exp(s) = exp(s / T) ** T: where T is 1, 2 or 4 the cross-entropy costs no third exponential.
    if CE == 2 or CE == 4:
        e_1 = e_s * e_s
    if CE == 4:
        e_1 = e_1 * e_1
    if CE == -1:
        e_1 = tl.exp2(d_s * LOG2E)
    x_t = (t - wide(m_t)) * wide(a_t)
    return x_s, x_t, e_s, tl.exp2(x_t), e_1


@triton.jit
def tile_sums(s, t, m_s, m_t, a_s, a_t, CE: tl.constexpr, GENERAL: tl.constexpr):
    """The sums ``[R, L]`` over the pieces of a tile relative to maxima m_s and m_t, and ``(e_s, e_t, e_1)``."""
    x_s, x_t, e_s, e_t, e_1 = exponentials(s, t, finite_or_zero(m_s), finite_or_zero(m_t), a_s, a_t, CE)
    # A class that the teacher excludes counts 0, also where the student excludes it too (0 * inf).
    gap = tl.where(e_t == 0, 0.0, x_t - x_s)
    z_s = tl.sum(e_s, PIECES)
    z_t = tl.sum(e_t, PIECES)
    cross = tl.sum(e_t * gap, PIECES)
    z_1 = z_s
    u_s = z_s
    u_t = z_s
    w = z_s
    if (CE == 2 or CE == 4) or CE == -1:
        z_1 = tl.sum(e_1, PIECES)
    if GENERAL:
        u_s = tl.sum(tl.where(e_s == 0, 0.0, e_s * x_s), PIECES)
        u_t = tl.sum(tl.where(e_t == 0, 0.0, e_t * x_s), PIECES)
        w = tl.sum(tl.where(e_t == 0, 0.0, e_t * x_t * gap), PIECES)
    return (z_s, z_t, cross, z_1, u_s, u_t, w), (e_s, e_t, e_1)


@triton.jit
def sum_lanes(sums, CE: tl.constexpr, GENERAL: tl.constexpr):
    """The sums ``[R]`` of a row."""
    z_s = tl.sum(sums[0], 1)
    z_1 = z_s
    u_s = z_s
    u_t = z_s
    w = z_s
    if (CE == 2 or CE == 4) or CE == -1:
        z_1 = tl.sum(sums[3], 1)
    if GENERAL:
        u_s = tl.sum(sums[4], 1)
        u_t = tl.sum(sums[5], 1)
        w = tl.sum(sums[6], 1)
    return (z_s, tl.sum(sums[1], 1), tl.sum(sums[2], 1), z_1, u_s, u_t, w)


@triton.jit
def rebased(sums, m_t, new_t, a_t):
    """The same sums where the teacher's are relative to a larger logit than m_t, which is -inf for the empty set."""
    x_t = tl.where(m_t == -INFINITY, 0.0, m_t - new_t) * a_t
    f_t = tl.exp2(x_t)
    z_s, z_t, cross, z_1, u_s, u_t, w = sums
    w = w + x_t * cross + x_t * (cross + u_t) + x_t * x_t * z_t
    # Sums that vanish beside the others count 0 even where they are infinite.
    gone = f_t == 0
    return (
        z_s,
        z_t * f_t,
        tl.where(gone, 0.0, (cross + z_t * x_t) * f_t),
        z_1,
        u_s,
        tl.where(gone, 0.0, u_t * f_t),
        tl.where(gone, 0.0, w * f_t),
    )


@triton.jit
def added(p, q):
    """Two sets of sums relative to the same maxima, together."""
    return (p[0] + q[0], p[1] + q[1], p[2] + q[2], p[3] + q[3], p[4] + q[4], p[5] + q[5], p[6] + q[6])


@triton.jit
def z_score(m2, C, T):
    """``1 / (eps + std)`` and std of each row, from its sum of squares about the mean."""
    # One class has no spread: its standard deviation counts 0, as everywhere in this package.
    deviation = tl.sqrt(m2 / tl.maximum(C - 1, 1).to(T.dtype))
    return 1.0 / (deviation + 1e-7), deviation


@triton.jit
def log1p_unit(x):
    """``log(1 + x)`` for x in [0, 1], to the last bit or two.

    ``2 atanh(x / (2 + x))`` by its series: the hardware's fast logarithm has no relative precision next to 1, and the
    device libraries' log1p does not exist under the interpreter. The ratio's square is at most 1/9.
    """
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 7
    z = x / (2.0 + x)
    square = z * z
    series = tl.zeros_like(x)
    for k in tl.static_range(TERMS + 1):
        series = series * square + 1.0 / (2 * (TERMS - k) + 1)
    return 2.0 * z * series


@triton.jit
def label_probability(d):
    """``(q, 1 - q, log q, log(1 - q))`` for the label's log odds d, each to its own relative precision."""
    small = tl.exp(-tl.abs(d))
    big = 1.0 / (1.0 + small)
    tail = log1p_unit(small)
    return (
        tl.where(d >= 0, big, small * big),
        tl.where(d >= 0, small * big, big),
        tl.minimum(d, 0.0) - tail,
        tl.minimum(-d, 0.0) - tail,
    )


@triton.jit
def log_odds(x_y, z):
    """Log odds of the label, which lies ``x_y`` bits over the maximum that ``z`` is relative to."""
    # A label at +inf would look certain; the rule is that the row is NaN.
    return tl.where(x_y == INFINITY, float("nan"), x_y * LN2 - tl.log(z))


@triton.jit
def entropy_term(p, log_p, log_q):
    """``p (log p - log q)``, 0 where p is 0."""
    return tl.where(p == 0, 0.0, p * (log_p - log_q))


@triton.jit
def weighted(weight, term):
    """``weight * term``, 0 for an infinite term of weight 0; a NaN stays one."""
    return tl.where((weight == 0) & (tl.abs(term) == INFINITY), 0.0, weight * term)


@triton.jit
def finish_row(
    sums, m_s, m_t, s_y, t_y, a_s, a_t, T, factor, mean, scale, deviation, C, decoupled, kd_weight, alpha, beta,
    ce_weight, CE: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """``(kd, ce, gradient of the temperature)`` and the coefficients of :func:`gradient`.

    The gradient of KD at ``x / T`` is ``g_s e_s - g_t e_t`` for a class and ``g_y`` for the label. By the temperature
    it is ``2 T F - T (sum_i u_i dF/du_i + v_i dF/dv_i)`` of ``loss = T^2 F(s / T, t / T)``; both inner sums vanish for
    constant u and v, so the maxima may stay subtracted.
    """
    z_s, z_t, cross, z_1, u_s, u_t, w = sums
    m_s = finite_or_zero(m_s)
    x_s = (s_y - m_s) * a_s
    x_t = (t_y - finite_or_zero(m_t)) * a_t
    d_s = log_odds(x_s, z_s)
    d_t = log_odds(x_t, z_t)
    q, rest_q, log_q, log_rest_q = label_probability(d_s)
    p, rest_p, log_p, log_rest_p = label_probability(d_t)
    # Both near 1: their difference is that of the complements, which have kept their digits.
    excess = tl.where((d_s > 0) & (d_t > 0), rest_p - rest_q, q - p)
    tckd = entropy_term(p, log_p, log_q) + entropy_term(rest_p, log_rest_p, log_rest_q)
    inverse_s = inverse(z_s)
    inverse_t = inverse(z_t)
    # One logarithm of the ratio: two would each round at the size of log C. Where the student excludes every class
    # that the teacher keeps, the cross term is infinite by itself.
    ratio = tl.where(z_s == 0, 1.0, z_s * inverse_t)
    nckd = tl.where(z_t == 0, 0.0, cross * inverse_t * LN2 + tl.log(ratio))
    A = tl.full(T.shape, alpha, T.dtype)
    # A teacher that leaves nothing beside the label leaves nothing to match there.
    B = tl.where(decoupled, tl.where(z_t == 0, 0.0, tl.full(T.shape, beta, T.dtype)), rest_p)
    # KD: (1 - p) - (q - p) = 1 - q, without the cancellation.
    others = tl.where(decoupled, B - A * excess, rest_q)
    kd = T * T * (weighted(A, tckd) + weighted(B, nckd))

    weight = factor * tl.full(T.shape, kd_weight, T.dtype)
    by_temperature = kd
    slope = kd
    if GENERAL:
        mean_u = LN2 * u_s * inverse_s
        teacher_u = LN2 * u_t * inverse_t
        gap = LN2 * cross * inverse_t
        teacher_v = teacher_u + gap
        covariance = LN2 * LN2 * w * inverse_t - teacher_v * gap
        variance = p * rest_p
        above = tl.where(variance == 0, 0.0, variance * (LN2 * x_t - teacher_v))
        inner = B * (mean_u - teacher_u) + tl.where(excess == 0, 0.0, A * excess * (LN2 * x_s - mean_u))
        inner += tl.where(variance == 0, 0.0, A * above * (d_t - d_s)) + B * covariance
        inner -= tl.where(decoupled | (variance == 0), 0.0, above * nckd)
        by_temperature = weight * (2.0 * kd / T - T * inner)
        # dz_i/ds_j = ([i = j] - 1/C) / (eps + std) - z_i z_j / ((C - 1) std); the gradient at z sums to 0.
        dstd = T * T * LN2 * (others * u_s * inverse_s - B * u_t * inverse_t + A * excess * x_s)
        # Without a z-score the deviation is 0, and so is the slope.
        slope = deviation * tl.maximum(C - 1, 1).to(T.dtype)
        slope = tl.where(deviation == 0, 0.0, weight * scale * dstd / slope)
        weight = weight * scale
    weight = weight * T
    at_label = weight * A * excess
    ce = tl.zeros_like(kd)
    g_1 = ce
    if CE != 0:
        # The cross-entropy is one of the student's own logits: temperature 1.
        offset = s_y - m_s
        offset = tl.where(offset == INFINITY, float("nan"), offset - tl.log(z_1))
        _q, rest_1, log_1, _log_rest = label_probability(offset)
        ce = -log_1
        ce_factor = factor * tl.full(T.shape, ce_weight, T.dtype)
        g_1 = ce_factor * rest_1 * inverse(z_1)
        at_label -= ce_factor * rest_1
    if GENERAL:
        at_label -= tl.where(slope == 0, 0.0, slope * (s_y - mean))
    g_s = weight * others * inverse_s
    if CE == 1:  # the same exponentials
        g_s += g_1
    return kd, ce, by_temperature, (g_s, weight * B * inverse_t, g_1, at_label, slope, mean)


@triton.jit
def gradient(coefficients, s, exponentials, CE: tl.constexpr, GENERAL: tl.constexpr):
    """The gradient of every class but the label."""
    e_s, e_t, e_1 = exponentials
    g = wide(coefficients[0]) * e_s - wide(coefficients[1]) * e_t
    if (CE == 2 or CE == 4) or CE == -1:
        g += wide(coefficients[2]) * e_1
    if GENERAL:
        # A row without a slope may hold no logits but -inf.
        slope = wide(coefficients[4])
        g -= tl.where(slope == 0, 0.0, slope * (s - wide(coefficients[5])))
    return g
