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

#include "../row_math.h"
#include "simd.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

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

// What the absent classes of a top-k teacher hold: see tail_logit.
template <typename X, typename T>
inline T tail_of(const X* values, int64_t k, int64_t C, bool uniform) {
  double mass = 0;
  if (uniform)
    for (int64_t j = 0; j < k; ++j) mass += std::exp(static_cast<double>(values[j]));
  return tail_logit<T>(uniform, mass, C - k);
}

// The whole row that a top-k teacher stands for.
template <typename X, typename T>
inline void densify(const X* values, const int64_t* indices, int64_t k, int64_t C, T tail, T* row) {
  std::fill(row, row + C, tail);
  for (int64_t j = 0; j < k; ++j) row[indices[j]] = static_cast<T>(values[j]);
}

// The same row without what is far from the k and from the label: only the vectors at its breaks are written. Their places go
// to `at`, their number is returned; `seen` is scratch of a byte for each vector, in whole words of 8.
template <typename X, typename T>
inline int64_t scatter(const X* values, const int64_t* indices, int64_t k, int64_t C, int64_t label, T tail, T* row,
                       uint8_t* seen, int32_t* at) {
  constexpr int64_t kWidth = Vec<T>::size();
  const int64_t words = (C + 8 * kWidth - 1) / (8 * kWidth);
  std::memset(seen, 0, words * 8);
  const auto claim = [&](int64_t c) {
    uint8_t& mark = seen[c / kWidth];
    if (!std::exchange(mark, 1)) std::fill_n(row + c / kWidth * kWidth, kWidth, tail);
  };
  claim(label);
  if (C % kWidth) claim(C - 1);
  for (int64_t j = 0; j < k; ++j) {
    claim(indices[j]);
    row[indices[j]] = static_cast<T>(values[j]);
  }
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

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
