// The terms of a row's KD and cross-entropy from its sums, in floats. Every lane of a row computes them, and they would
// take half as long as its classes: with the processor's approximate functions, whose relative error is a few roundings.
// row_terms of row_math.h has the same for doubles and for the temperature's gradient, of which little is left of large
// terms.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

// From 2^-80 on, what was too small to be represented is below a sum's rounding. Far above C, the label is so far below
// the others that the logarithms of KD's sums would be large numbers with a small difference. The cross-entropy takes no
// such difference: only its exponents lose digits, and a student that is wrong by ten is no rarity.
constexpr float kMostOfKd = 0x1p8f, kMostOfCe = 0x1p16f;
template <typename T>
SORTKD_DEVICE bool well_scaled(T z, T most) {
  return (z > static_cast<T>(0x1p-80)) & (z < most);
}

// What exponents are relative to where the label does not do: the largest of the others, or nothing at all.
template <typename T>
SORTKD_DEVICE T reference_of(T largest, T label) {
  return largest != -kInfinity<T> ? largest : fabs(label) < kInfinity<T> ? label : T(0);
}

// e^power for the powers 2 and 4.
template <typename T>
SORTKD_DEVICE T raised(T e, T power) {
  e *= e;
  return power == T(4) ? e * e : e;
}

// What the logits of a side are turned into: exponents of two, relative to one of them.
template <typename T>
struct GeneralExponent {
  T scale, reference;
  SORTKD_DEVICE void relative_to(T x) { reference = x; }
  SORTKD_DEVICE T operator()(T x) const { return (x - reference) * scale; }
};
// In one instruction; its error grows with the logit, not with the difference, which is as much as the logit's own.
template <typename T>
struct KdExponent {
  T scale, offset;
  SORTKD_DEVICE void relative_to(T x) { offset = -(x * scale); }
  SORTKD_DEVICE T operator()(T x) const { return fma(x, scale, offset); }
};
template <typename T, Mode mode>
using Exponent = std::conditional_t<mode == Mode::General, GeneralExponent<T>, KdExponent<T>>;

// The sums of a row, over the classes beside the label; the moments are the general mode's (general.cuh).
enum { kZStudent, kZTeacher, kCross, kZCe, kMomentStudent, kMomentTeacher, kMomentCross, kGeneralSums };

// Of the classes beside the label, relative to any two references; u and v are exponents of two.
struct KdSums {
  float z_student, z_teacher;  // sums of 2^u and 2^v
  float cross;                 // sum of 2^v (v - u)
  float z_ce;                  // sum of 2^(power u), where there is a power
  float u_label, v_label;
};

// The gradient is on_student 2^u - on_teacher 2^v + on_ce times the cross-entropy's exponential, and at_label.
struct KdTerms {
  float kd, ce;
  float on_student, on_teacher, on_ce, at_label;
};

// log(a / b), relative to its size exact also where a and b are nearly equal.
SORTKD_DEVICE float log_of_quotient(float a, float b, float difference) {
  // 2 artanh(r) by its series where |r| is at most a third.
  const float r = difference * reciprocal(a + b), square = r * r;
  float series = 2.0f / 13;
#pragma unroll
  for (int n = 11; n >= 1; n -= 2) series = fmaf(series, square, 2.0f / static_cast<float>(n));
  return square <= 1.0f / 9 ? r * series : log2_of(a * reciprocal(b)) * static_cast<float>(kLn2);
}

// The cross-entropy beside KD: from the label's exponent `u`, at most 0 or so, and its power of two, and from the sum of
// the others', which `by` makes relative to the same.
SORTKD_DEVICE void add_ce(KdTerms& terms, float u, float label, float by, float z_ce, float ce_scale) {
  const float z = z_ce * by, inverse = reciprocal(z + label);
  // Minus the label's own exponent, which may be far below what a float holds as a power.
  terms.ce = fmaf(-u, static_cast<float>(kLn2), log_of_quotient(z + label, 1.0f, z + (label - 1.0f)));
  terms.on_ce = ce_scale * inverse * by;
  terms.at_label = fmaf(-ce_scale * z, inverse, terms.at_label);
}

// `weight` is that of the row, `inverse` what its logits are multiplied by.
SORTKD_DEVICE KdTerms kd_terms(const Params<float>& p, const KdSums& sums, float weight, float temperature, float inverse) {
  const float kd_scale = weight * p.kd_weight * temperature * (temperature * inverse);
  // The sums relative to the label, whose exponential is exactly 1 then: 1 - q_y keeps its digits. A label far below the
  // others keeps its place, or their sums would be infinite.
  const float shift_s = sums.u_label > -1.0f ? sums.u_label : 0.0f, shift_t = sums.v_label > -1.0f ? sums.v_label : 0.0f;
  const float by_s = power_of_two(-shift_s), by_t = power_of_two(-shift_t);
  const float u = sums.u_label - shift_s, v = sums.v_label - shift_t;
  const float label_s = power_of_two(u), label_t = power_of_two(v);
  const float z_s = sums.z_student * by_s, z_t = sums.z_teacher * by_t;
  const float cross = expected(by_t, sums.cross - sums.z_teacher * (shift_t - shift_s)), gap = expected(label_t, v - u);
  const float all_s = z_s + label_s, all_t = z_t + label_t;
  const float inverse_s = reciprocal(all_s), inverse_t = reciprocal(all_t);
  const float log_all = log_of_quotient(all_s, all_t, z_s - z_t + (label_s - label_t));

  KdTerms terms;
  float pull = fmaf(label_s, z_t, -(label_t * z_s)) * inverse_s * inverse_t;  // q_y - p_y
  terms.kd = fmaf((cross + gap) * static_cast<float>(kLn2), inverse_t, log_all);
  terms.on_student = kd_scale * inverse_s * by_s;
  terms.on_teacher = kd_scale * inverse_t * by_t;
  if (p.decoupled) {
    // The label against the rest; and the rest among themselves, to which a teacher that leaves nothing there says
    // nothing, and of which a student that has nothing there knows nothing.
    const bool rest_t = sums.z_teacher != 0.0f, rest_s = sums.z_student != 0.0f;
    const float log_rest = log_of_quotient(sums.z_student, sums.z_teacher, sums.z_student - sums.z_teacher);
    const float beta = rest_t ? p.beta : 0.0f, log_z = log_rest + (shift_t - shift_s) * static_cast<float>(kLn2);
    const float target = fmaf(gap * static_cast<float>(kLn2) - expected(z_t, log_z), inverse_t, log_all);
    const float mean = sums.cross * static_cast<float>(kLn2) * reciprocal(sums.z_teacher);
    const float others = !rest_t ? 0.0f : rest_s ? mean + log_rest : kInfinity<float>;
    terms.kd = weighted(p.alpha, target) + weighted(beta, others);
    pull *= p.alpha;
    terms.on_student = rest_s ? kd_scale * (beta - pull) * reciprocal(sums.z_student) : 0.0f;
    terms.on_teacher = rest_t ? kd_scale * beta * reciprocal(sums.z_teacher) : 0.0f;
  }
  terms.kd *= temperature * temperature;
  terms.at_label = kd_scale * pull;
  terms.ce = terms.on_ce = 0.0f;
  if (p.power > 0) {
    add_ce(terms, p.power * u, power_of_two(p.power * u), power_of_two(-p.power * shift_s), sums.z_ce, weight * p.ce_weight);
  }
  return terms;
}

}  // namespace cuda
}  // namespace sortkd
