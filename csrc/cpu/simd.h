// What the row kernels need of a vector beyond at::vec::Vectorized, for the instruction set that this file is compiled for.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

namespace sortkd {
inline namespace CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
inline void prefetch(const T* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// 2^x, exactly 0 far below the normal range, NaN for NaN. Degree-5 minimax polynomial on [-1/2, 1/2] among those that are
// exactly 1 at 0, relative error 1.7e-7 with its roundings; beyond the range it is huge or inf.
inline Vec<float> exp2(Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  // clamp_min returns its first operand when that is NaN. 2^-160 rounds to 0; -infinity itself would turn into NaN below.
  x = at::vec::clamp_min(x, Vec<float>(-160.0f));
  const Vec<float> n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // From 2^-127 down the exponent's bits below are 0, and so is the result.
  x = at::vec::clamp_max(at::vec::clamp_min(x, Vec<float>(-127.0f)), Vec<float>(127.0f));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it, biased, in the low bits: no conversion instruction is needed.
  const Vec<float> shifted = x + Vec<float>(12582912.0f + 127.0f);
  const Vec<float> n = shifted - Vec<float>(12582912.0f + 127.0f);
#endif
  const Vec<float> f = x - n;
  Vec<float> y = Vec<float>(1.32647273e-3f);
  y = at::vec::fmadd(y, f, Vec<float>(9.67151299e-3f));
  y = at::vec::fmadd(y, f, Vec<float>(5.55073358e-2f));
  y = at::vec::fmadd(y, f, Vec<float>(2.40222424e-1f));
  y = at::vec::fmadd(y, f, Vec<float>(6.93146992e-1f));
  y = at::vec::fmadd(y, f, Vec<float>(1.0f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(y, n);
#elif defined(CPU_CAPABILITY_AVX2)
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

inline Vec<double> exp2(Vec<double> x) { return x.exp2(); }

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
