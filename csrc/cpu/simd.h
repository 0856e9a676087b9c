// What the row kernels need of a vector beyond at::vec::Vectorized, for the instruction set that this file is compiled for.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sortkd {
inline namespace CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

inline void prefetch(const char* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}
inline void prefetch_to_write(const char* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 1);
#endif
}

#if defined(CPU_CAPABILITY_AVX512)
alignas(64) inline constexpr float kPowers[32] = {
    1.0f,         1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f, 1.163724859f,
    1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f,
    1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f, 1.610490332f, 1.645755478f,
    1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f, 1.834008086f, 1.874167634f, 1.915206561f, 1.957144124f};

// 2^x, 0 far below the normal range, NaN for NaN, exactly 1 at 0. x = n + f with n a multiple of 1/32: 2^n by a table and the
// exponent, 2^f by a parabola (|f| <= 1/64; the linear coefficient is larger than ln 2 by what halves the cubic rest twice).
// Relative error 1.2e-7, nearly all of it two roundings. Half as many operations on the multiplier as a polynomial on
// [-1/2, 1/2].
inline Vec<float> exp2(Vec<float> x) {
  // clamp_min returns its first operand when that is NaN. 2^-160 rounds to 0; -infinity itself would turn into NaN below.
  x = at::vec::clamp_min(x, Vec<float>(-160.0f));
  // Adding 1.5 * 2^18 rounds to a multiple of 2^-5 and leaves 32 n in the low bits.
  const Vec<float> magic(393216.0f), shifted = x + magic, n = shifted - magic, f = x - n;
  const Vec<float> power =
      _mm512_permutex2var_ps(_mm512_load_ps(kPowers), _mm512_castps_si512(shifted), _mm512_load_ps(kPowers + 16));
  const Vec<float> slope = at::vec::fmadd(f, Vec<float>(0.24022651f), Vec<float>(0.69315739f));
  return _mm512_scalef_ps(at::vec::fmadd(power * f, slope, power), n);  // which takes the floor of n
}
#else
// 2^x, exactly 0 far below the normal range, NaN for NaN. Degree-5 minimax polynomial on [-1/2, 1/2] among those that are
// exactly 1 at 0, relative error 1.7e-7 with its roundings; beyond the range it is huge or inf.
inline Vec<float> exp2(Vec<float> x) {
  // From 2^-127 down the exponent's bits below are 0, and so is the result.
  x = at::vec::clamp_max(at::vec::clamp_min(x, Vec<float>(-127.0f)), Vec<float>(127.0f));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it, biased, in the low bits: no conversion instruction is needed.
  const Vec<float> shifted = x + Vec<float>(12582912.0f + 127.0f);
  const Vec<float> n = shifted - Vec<float>(12582912.0f + 127.0f);
  const Vec<float> f = x - n;
  Vec<float> y = Vec<float>(1.32647273e-3f);
  y = at::vec::fmadd(y, f, Vec<float>(9.67151299e-3f));
  y = at::vec::fmadd(y, f, Vec<float>(5.55073358e-2f));
  y = at::vec::fmadd(y, f, Vec<float>(2.40222424e-1f));
  y = at::vec::fmadd(y, f, Vec<float>(6.93146992e-1f));
  y = at::vec::fmadd(y, f, Vec<float>(1.0f));
#if defined(CPU_CAPABILITY_AVX2)
  return y * Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
#else
  alignas(64) float bits[Vec<float>::size()];
  shifted.store(bits);
  for (int i = 0; i < Vec<float>::size(); ++i) {
    uint32_t word;
    std::memcpy(&word, bits + i, sizeof word);
    word <<= 23;
    std::memcpy(bits + i, &word, sizeof word);
  }
  return y * Vec<float>::loadu(bits);
#endif
}
#endif

inline Vec<double> exp2(Vec<double> x) { return x.exp2(); }

// A logit as an exponent, (x - reference) * scale.
template <typename T>
struct Difference {
  T reference, scale;
  T operator()(T x) const { return (x - reference) * scale; }
  Vec<T> operator()(const Vec<T>& x) const { return (x - Vec<T>(reference)) * Vec<T>(scale); }
};

// The same in one operation, with one rounding of a small number; the shift's own rounding is the same for all classes of a
// row. It needs a fused multiply-add: a product rounded by itself would lose the digits of logits with a large offset.
template <typename T>
struct FusedDifference {
  T scale, shift;
  FusedDifference(T reference, T scale) : scale(scale), shift(-reference * scale) {}
  T operator()(T x) const { return std::fma(x, scale, shift); }
  Vec<T> operator()(const Vec<T>& x) const { return at::vec::fmadd(x, Vec<T>(scale), Vec<T>(shift)); }
};

// Under standardization a constant row's scale is 10^7, and equal logits must differ by exactly 0.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <typename T, bool standardized>
using Exponent = std::conditional_t<standardized, Difference<T>, FusedDifference<T>>;
#else
template <typename T, bool standardized>
using Exponent = Difference<T>;
#endif

// sum + e * d, and `sum` where e is 0 whatever d is: a class of probability 0 contributes nothing, at infinity too.
template <typename T>
inline Vec<T> add_nonzero(Vec<T> sum, Vec<T> e, Vec<T> d) {
  return sum + ((e * d) & (e != Vec<T>(T(0))));
}
#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> add_nonzero(Vec<float> sum, Vec<float> e, Vec<float> d) {
  return _mm512_mask3_fmadd_ps(e, d, sum, _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_NEQ_UQ));
}
#endif

// count + 1 in the lanes where x > threshold.
template <typename T>
inline Vec<T> count_above(Vec<T> count, Vec<T> x, Vec<T> threshold) {
  return count + ((x > threshold) & Vec<T>(T(1)));
}
#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> count_above(Vec<float> count, Vec<float> x, Vec<float> threshold) {
  return _mm512_mask_add_ps(count, _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ), count, _mm512_set1_ps(1.0f));
}
#endif

// A bit for each lane: whether a > b, and whether a >= b.
template <typename T>
inline uint32_t lanes_of(const Vec<T>& condition) {
  return ~static_cast<uint32_t>((condition & Vec<T>(T(1))).zero_mask()) & ((1u << Vec<T>::size()) - 1);
}
template <typename T>
inline uint32_t lanes_above(const Vec<T>& a, const Vec<T>& b) {
  return lanes_of(a > b);
}
template <typename T>
inline uint32_t lanes_not_below(const Vec<T>& a, const Vec<T>& b) {
  return lanes_of(a >= b);
}
#if defined(CPU_CAPABILITY_AVX512)
template <>
inline uint32_t lanes_above(const Vec<float>& a, const Vec<float>& b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
template <>
inline uint32_t lanes_not_below(const Vec<float>& a, const Vec<float>& b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
#endif

template <typename T, typename F>
inline T fold_lanes(const Vec<T>& v, F&& f) {
  alignas(64) T lanes[Vec<T>::size()];
  v.store(lanes);
  // Halving: a fixed order, and shorter than lane after lane.
  for (int width = Vec<T>::size() / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = f(lanes[i], lanes[i + width]);
  return lanes[0];
}

template <typename T>
inline T sum_of(const Vec<T>& v) {
  return fold_lanes(v, [](T a, T b) { return a + b; });
}
template <typename T>
inline T max_of(const Vec<T>& v) {
  return fold_lanes(v, [](T a, T b) { return a > b ? a : b; });
}
#if defined(CPU_CAPABILITY_AVX512)
inline float sum_of(const Vec<float>& v) { return _mm512_reduce_add_ps(v); }
inline float max_of(const Vec<float>& v) { return _mm512_reduce_max_ps(v); }
#endif

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
