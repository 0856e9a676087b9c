# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""From the sums of a row to its loss terms and to the few coefficients of its gradient.

With log odds ``d = x_y - log z`` of the label against all others, ``q_y = sigmoid(d)``. Every logarithm below keeps its
relative precision at both ends, so a label with ``q_y`` rounding to 1 still has a finite loss and a right gradient.
The gradient of the row is ``g_s e_s - g_t e_t + g_1 e_1`` for a class and ``g_y + g_1y`` for the label.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import INFINITY, finite_or_zero

LN2 = tl.constexpr(0.6931471805599453)


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
def log_odds(x_y, z):
    """Log odds of the label, which lies ``x_y`` bits over the maximum that ``z`` is relative to."""
    # A label at +inf would look certain; the rule is that the row is NaN.
    return tl.where(x_y == INFINITY, float("nan"), x_y * LN2 - tl.log(z))


@triton.jit
def label_probability(d):
    """``(q, 1 - q, log q, log(1 - q))`` for log odds d, each to its own relative precision."""
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
def inverse(z):
    """1/z, or 0 for the sum over no class."""
    return tl.where(z == 0, 0.0, 1.0 / z)


@triton.jit
def entropy_term(p, log_p, log_q):
    """``p (log p - log q)``, 0 where p is 0."""
    return tl.where(p == 0, 0.0, p * (log_p - log_q))


@triton.jit
def weighted(weight, term):
    """``weight * term``, 0 for an infinite term of weight 0; a NaN stays one."""
    return tl.where((weight == 0) & (tl.abs(term) == INFINITY), 0.0, weight * term)


@triton.jit
def distillation(sums, s_y, t_y, a_s, a_t, T, alpha, beta, DECOUPLED: tl.constexpr, LEARNED: tl.constexpr):
    """KD or DKD of each row, ``(g_s, g_t, g_y)`` of its gradient, and its derivative by the temperature.

    The derivative is ``2 T F - T (sum_i u_i dF/du_i + v_i dF/dv_i)`` of ``loss = T^2 F(s / T, t / T)``; both inner sums
    vanish for constant u and v, so the maxima may stay subtracted.
    """
    m_s, m_t, z_s, z_t, cross, _z_1, u_s, u_t, w = sums
    x_s = (s_y - finite_or_zero(m_s)) * a_s
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
    if DECOUPLED:
        A = tl.full(T.shape, alpha, T.dtype)
        # A teacher that leaves nothing beside the label leaves nothing to match there.
        B = tl.where(z_t == 0, 0.0, tl.full(T.shape, beta, T.dtype))
        g_s = T * (B - A * excess) * inverse_s
    else:
        A = tl.full(T.shape, 1.0, T.dtype)
        B = rest_p
        # (1 - p) - (q - p) = 1 - q, without the cancellation.
        g_s = T * rest_q * inverse_s
    kd = T * T * (weighted(A, tckd) + weighted(B, nckd))

    by_temperature = kd
    if LEARNED:
        mean_u = LN2 * u_s * inverse_s
        teacher_u = LN2 * u_t * inverse_t
        gap = LN2 * cross * inverse_t
        teacher_v = teacher_u + gap
        covariance = LN2 * LN2 * w * inverse_t - teacher_v * gap
        spread = p * rest_p
        above = tl.where(spread == 0, 0.0, spread * (LN2 * x_t - teacher_v))
        inner = B * (mean_u - teacher_u) + tl.where(excess == 0, 0.0, A * excess * (LN2 * x_s - mean_u))
        inner += tl.where(spread == 0, 0.0, A * above * (d_t - d_s)) + B * covariance
        if not DECOUPLED:
            inner -= tl.where(spread == 0, 0.0, above * nckd)
        by_temperature = 2.0 * kd / T - T * inner
    return kd, g_s, T * B * inverse_t, T * A * excess, by_temperature, x_s


@triton.jit
def cross_entropy(m_s, z_1, s_y):
    """``(ce, g_1, g_1y)``: cross-entropy of the student's own logits, and the coefficients of its gradient."""
    offset = s_y - finite_or_zero(m_s)
    _q, rest_q, log_q, _log_rest = label_probability(tl.where(offset == INFINITY, float("nan"), offset - tl.log(z_1)))
    return -log_q, rest_q * inverse(z_1), -rest_q


@triton.jit
def z_score(m2, C, T):
    """``1 / (eps + std)`` and std of each row, from its sum of squares about the mean."""
    # One class has no spread: its standard deviation counts 0, as everywhere in this package.
    deviation = tl.sqrt(m2 / tl.maximum(C - 1, 1).to(T.dtype))
    return 1.0 / (deviation + 1e-7), deviation
