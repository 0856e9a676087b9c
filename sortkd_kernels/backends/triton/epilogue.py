# ruff: noqa: ANN001, ANN201 - in a kernel an annotation is an instruction to the compiler, not a type
"""The end of a row: weigh its terms, store its scalars, and give each class its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .terms import LN2, cross_entropy, distillation


@triton.jit
def finish_row(
    sums, s_y, t_y, a_s, a_t, T, mean, scale, deviation, factor, C, kd_weight, alpha, beta, ce_weight,
    DECOUPLED: tl.constexpr, STANDARDIZE: tl.constexpr, LEARNED: tl.constexpr, CE: tl.constexpr,
):  # fmt: skip
    """``kd``, ``ce``, the loss, the temperature's gradient, and the coefficients of :func:`gradient`."""
    kd, g_s, g_t, g_y, by_temperature, x_s = distillation(sums, s_y, t_y, a_s, a_t, T, alpha, beta, DECOUPLED, LEARNED)
    kd_weight = tl.full(T.shape, kd_weight, T.dtype)
    ce_weight = tl.full(T.shape, ce_weight, T.dtype)
    loss = kd_weight * kd
    ce = tl.zeros_like(kd)
    g_1 = ce
    g_1y = ce
    if CE:
        ce, g_1, g_1y = cross_entropy(sums[0], sums[5], s_y)
        # Asked for as a part only, an infinite cross-entropy leaves the loss alone.
        loss += tl.where(ce_weight == 0, 0.0, ce_weight * ce)

    slope = tl.zeros_like(kd)
    weight = factor * kd_weight
    if STANDARDIZE:
        # dz_i/ds_j = ([i = j] - 1/C) / (eps + std) - z_i z_j / ((C - 1) std); the gradient at z sums to 0.
        along = T * LN2 * (g_s * sums[6] - g_t * sums[7] + g_y * x_s)
        spread = deviation * tl.maximum(C - 1, 1).to(T.dtype)
        slope = tl.where(deviation == 0, 0.0, weight * scale * along / spread)
        weight = weight * scale
    ce_weight = factor * ce_weight
    at_label = weight * g_y + ce_weight * g_1y - slope * (s_y - mean)
    coefficients = (weight * g_s, weight * g_t, ce_weight * g_1, at_label, slope, mean)
    return kd, ce, loss, factor * kd_weight * by_temperature, coefficients


@triton.jit
def gradient(coefficients, s, e_s, e_t, e_1, CE: tl.constexpr, STANDARDIZE: tl.constexpr):
    """The gradient of every class but the label, from its exponentials."""
    g = coefficients[0][:, None] * e_s - coefficients[1][:, None] * e_t
    if CE:
        g += coefficients[2][:, None] * e_1
    if STANDARDIZE:
        slope = coefficients[4][:, None]
        # A row that does not count has no slope, and no logits but -inf.
        g -= tl.where(slope == 0, 0.0, slope * (s - coefficients[5][:, None]))
    return g
