// Between memory and the rows that the kernels work on: conversion, transposed tiles, top-k teachers, the way back.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "../row_math.h"
#include "simd.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

template <typename F>
inline void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::Float: return f(float{});
    case Dtype::BFloat16: return f(c10::BFloat16{});
    case Dtype::Half: return f(c10::Half{});
    default: return f(double{});
  }
}
template <typename T>
constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::Double : Dtype::Float;

inline const char* element(const void* base, Dtype dtype, int64_t index) {
  return static_cast<const char*>(base) + index * bytes_of(dtype);
}

template <typename X>
constexpr bool is_half = std::is_same_v<X, c10::Half> || std::is_same_v<X, c10::BFloat16>;

inline auto to_floats(const at::vec::Vectorized<c10::BFloat16>& x) { return at::vec::convert_bfloat16_float(x); }
inline auto to_floats(const at::vec::Vectorized<c10::Half>& x) { return at::vec::convert_half_float(x); }
template <typename X>
inline at::vec::Vectorized<X> from_floats(const Vec<float>& low, const Vec<float>& high) {
  if constexpr (std::is_same_v<X, c10::Half>)
    return at::vec::convert_float_half(low, high);
  else
    return at::vec::convert_float_bfloat16(low, high);
}

// row[0 .. C) = x, converted.
template <typename X, typename T>
inline void load_row(const X* x, int64_t C, T* row) {
  if constexpr (std::is_same_v<X, T>) {
    std::memcpy(row, x, C * sizeof(T));
  } else if constexpr (is_half<X> && std::is_same_v<T, float>) {
    using H = at::vec::Vectorized<X>;
    int64_t i = 0;
    for (; i + H::size() <= C; i += H::size()) {
      auto [low, high] = to_floats(H::loadu(x + i));
      low.store(row + i);
      high.store(row + i + Vec<float>::size());
    }
    for (; i < C; ++i) row[i] = static_cast<float>(x[i]);
  } else {
    for (int64_t i = 0; i < C; ++i) row[i] = static_cast<T>(x[i]);
  }
}

// x = row[0 .. C), rounded once.
template <typename X, typename T>
inline void store_row(const T* row, int64_t C, X* x) {
  if constexpr (std::is_same_v<X, T>) {
    if (x != row) std::memcpy(x, row, C * sizeof(T));
  } else if constexpr (is_half<X> && std::is_same_v<T, float>) {
    using H = at::vec::Vectorized<X>;
    int64_t i = 0;
    for (; i + H::size() <= C; i += H::size())
      from_floats<X>(Vec<float>::loadu(row + i), Vec<float>::loadu(row + i + Vec<float>::size())).store(x + i);
    for (; i < C; ++i) x[i] = static_cast<X>(row[i]);
  } else {
    for (int64_t i = 0; i < C; ++i) x[i] = static_cast<X>(row[i]);
  }
}

// A tile of `count` neighbouring rows, to and from rows `pitch` apart. With classes `inner` apart, going class by class takes
// whole cache lines of the logits, which a row at a time would take `count` times.
template <typename X, typename T>
inline void load_tile(const X* x, int64_t C, int64_t inner, int64_t count, T* rows, int64_t pitch) {
  if (inner == 1) {
    for (int64_t r = 0; r < count; ++r) load_row(x + r * C, C, rows + r * pitch);
    return;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t r = 0; r < count; ++r) rows[r * pitch + c] = static_cast<T>(x[c * inner + r]);
}
template <typename X, typename T>
inline void store_tile(const T* rows, int64_t pitch, int64_t C, int64_t inner, int64_t count, X* x) {
  if (inner == 1) {
    for (int64_t r = 0; r < count; ++r) store_row(rows + r * pitch, C, x + r * C);
    return;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t r = 0; r < count; ++r) x[c * inner + r] = static_cast<X>(rows[r * pitch + c]);
}

// What the absent classes of a top-k teacher hold: see tail_logit. Of several entries of the label the first one counts.
template <typename X, typename T>
inline T tail_of(const X* values, const ClassIndices& indices, int64_t k, int64_t C, int64_t label, bool uniform) {
  double mass = 0;
  int64_t present = 0;
  bool labelled = false;
  for (int64_t j = 0; uniform && j < k; ++j) {
    if (indices[j] == label && std::exchange(labelled, true)) continue;
    mass += std::exp(static_cast<double>(values[j]));
    ++present;
  }
  return tail_logit<T>(uniform, mass, C - present);
}

// The whole row that a top-k teacher stands for. From the last entry to the first, which counts.
template <typename X, typename T>
inline void densify(const X* values, const ClassIndices& indices, int64_t k, int64_t C, T tail, T* row) {
  std::fill(row, row + C, tail);
  for (int64_t j = k; j-- > 0;) row[indices[j]] = static_cast<T>(values[j]);
}

// Where the vectors start that hold the label, one of the k, or the row's end where that fills none: ascending, to `at`; their
// number is returned. `seen` is scratch of a byte for each vector, in whole words of 8.
template <typename T>
inline int64_t top_k_breaks(const ClassIndices& indices, int64_t k, int64_t C, int64_t label, uint8_t* seen, int32_t* at) {
  constexpr int64_t kWidth = Vec<T>::size();
  const int64_t words = (C + 8 * kWidth - 1) / (8 * kWidth);
  std::memset(seen, 0, words * 8);
  seen[label / kWidth] = 1;
  if (C % kWidth) seen[C / kWidth] = 1;
  for (int64_t j = 0; j < k; ++j) seen[indices[j] / kWidth] = 1;
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint64_t any;
    std::memcpy(&any, seen + word * 8, sizeof any);
    if (!any) continue;
    for (int64_t v = word * 8; v < word * 8 + 8; ++v) {
      at[count] = static_cast<int32_t>(v * kWidth);
      count += seen[v];
    }
  }
  return count;
}

// The same row as `densify` makes without what is far from the k and from the label: only the vectors at its breaks are
// written.
template <typename X, typename T>
inline int64_t scatter(const X* values, const ClassIndices& indices, int64_t k, int64_t C, int64_t label, T tail, T* row,
                       uint8_t* seen, int32_t* at) {
  const int64_t count = top_k_breaks<T>(indices, k, C, label, seen, at);
  for (int64_t i = 0; i < count; ++i) std::fill_n(row + at[i], Vec<T>::size(), tail);
  for (int64_t j = k; j-- > 0;) row[indices[j]] = static_cast<T>(values[j]);
  return count;
}

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
