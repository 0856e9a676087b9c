// The passes over the classes of a row, a class at a time: sums, and gradient. Every method of the package is these two
// with other sums and other coefficients.
#pragma once

#include "row.cuh"

namespace sortkd {
namespace cuda {

// sum e_s, sum e_t, sum e_t (v_t - v_s) | sum e_1 | sum e_s v_s, sum e_t v_t, sum e_t v_t (v_t - v_s), with v in bits.
template <Passes passes>
constexpr int kSums = passes == Passes::Distillation ? 3 : passes == Passes::WithPower ? 4 : 7;

template <typename T, int n>
struct Sums {
  T of[n];
  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < n; ++i) of[i] += other.of[i];
  }
};

template <typename T>
__device__ __forceinline__ T finite_or_zero(T largest) {
  // A maximum of -infinity has nothing to be relative to, and would turn -infinity into NaN.
  return largest == -kInfinity<T> ? T(0) : largest;
}

// A class of probability 0 contributes nothing, at infinity too.
template <typename T>
__device__ __forceinline__ T product_or_zero(T e, T d) {
  return e == T(0) ? T(0) : e * d;
}

template <Passes passes, typename T>
__device__ __forceinline__ T plain_exponential(const Exponents<T>& x, T v, T e) {
  if constexpr (passes == Passes::General) return power_of_two(v * x.plain);
  if (x.power >= 2) e *= e;
  if (x.power == 4) e *= e;
  return e;
}

template <Passes passes, typename T>
__device__ __forceinline__ void add_class(Sums<T, kSums<passes>>& sums, const Exponents<T>& x, bool with_ce, T s, T t) {
  // The difference first: a fused x * scale - c would save an operation, and the digits of logits with a large offset.
  const T v_s = (s - x.reference_student) * x.student;
  const T v_t = (t - x.reference_teacher) * x.teacher;
  const T e_s = power_of_two(v_s), e_t = power_of_two(v_t);
  const T gap = v_t - v_s;
  sums.of[0] += e_s;
  sums.of[1] += e_t;
  sums.of[2] += product_or_zero(e_t, gap);
  if constexpr (passes != Passes::Distillation)
    if (passes == Passes::WithPower || with_ce) sums.of[3] += plain_exponential<passes>(x, v_s, e_s);
  if constexpr (passes == Passes::General) {
    sums.of[4] += product_or_zero(e_s, v_s);
    sums.of[5] += product_or_zero(e_t, v_t);
    sums.of[6] += product_or_zero(e_t, gap * v_t);
  }
}

template <Passes passes, typename T>
__device__ __forceinline__ T gradient_of(const Coefficients<T>& c, const Exponents<T>& x, bool with_ce,
                                         bool standardize, T s, T t) {
  const T v_s = (s - x.reference_student) * x.student;
  const T v_t = (t - x.reference_teacher) * x.teacher;
  const T e_s = power_of_two(v_s);
  T g = c.on_student * e_s - c.on_teacher * power_of_two(v_t);
  if constexpr (passes != Passes::Distillation)
    if (passes == Passes::WithPower || with_ce) g += c.on_plain * plain_exponential<passes>(x, v_s, e_s);
  if constexpr (passes == Passes::General)
    if (standardize) g -= c.along * (v_s - c.v_mean);
  return g;
}

// The sums in nats and with the label, as the row's formulas want them.
template <typename T, int n>
__device__ __forceinline__ RowSums<T> row_sums(const Sums<T, n>& sums, const Exponents<T>& x, T student_label,
                                               T teacher_label) {
  constexpr T ln2 = static_cast<T>(kLn2);
  RowSums<T> result{};
  result.z_student = sums.of[0];
  result.z_teacher = sums.of[1];
  result.cross = sums.of[2] * ln2;
  result.v_label_student = (student_label - x.reference_student) * x.student * ln2;
  result.v_label_teacher = (teacher_label - x.reference_teacher) * x.teacher * ln2;
  if constexpr (n > 3) {
    result.z_ce = sums.of[3];
    result.v_label_ce = result.v_label_student * x.plain;
  }
  if constexpr (n > 4) {
    result.moment_student = sums.of[4] * ln2;
    result.moment_teacher = sums.of[5] * ln2;
    result.moment_cross = sums.of[6] * (ln2 * ln2);
  }
  return result;
}

// f(std::integral_constant) for the passes of a call: a branch that all threads of a launch take alike.
template <bool general, typename F>
__device__ __forceinline__ void with_passes(Passes passes, F&& f) {
  if constexpr (general) {
    f(std::integral_constant<Passes, Passes::General>{});
  } else {
    if (passes == Passes::Distillation)
      f(std::integral_constant<Passes, Passes::Distillation>{});
    else
      f(std::integral_constant<Passes, Passes::WithPower>{});
  }
}

}  // namespace cuda
}  // namespace sortkd
