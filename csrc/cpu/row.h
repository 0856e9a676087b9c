// A row of logits as the kernels see it, and the ways of walking over it a vector at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../row_math.h"
#include "simd.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

// A short row and the next fit in L1 together, on both sides; of a long one only what comes next is fetched ahead. Of a huge
// one not even the gradient's memory would stay in L2 until it is written. Measured, as is the distance, in logits.
constexpr int64_t kLongRowBytes = 16 << 10, kHugeRowBytes = 256 << 10;
constexpr int64_t kAhead = 1024;
template <typename T>
inline bool is_longer(int64_t C, int64_t bytes) {
  return C * static_cast<int64_t>(sizeof(T)) > bytes;
}

// Where the vectors start that are not like the rest of their row, ascending: the label's, the last if the row does not fill
// it, and of a top-k teacher those that hold one of the k.
struct Breaks {
  const int32_t* at;
  int64_t count;
};

template <typename T>
struct Row {
  const T* logits;  // [C], in the caller's memory or in scratch; of a sparse row only the vectors at its breaks
  T* exps;          // scratch of C values, padded to whole vectors
  int64_t C;
  int64_t label;
  T label_value;
  T reference;  // exponentials are taken relative to this logit
  Breaks breaks;
  bool sparse;  // beyond the breaks every class holds `tail`, which is not above the label's logit
  T tail;
};

// run(begin, end) for the whole vectors between the breaks, special(i) for the vectors at them.
template <typename T, typename Run, typename Special>
inline void for_runs(int64_t C, const Breaks& breaks, Run&& run, Special&& special) {
  int64_t i = 0;
  for (int64_t k = 0; k < breaks.count; ++k) {
    const int64_t at = breaks.at[k];
    if (i < at) run(i, at);
    special(at);
    i = at + Vec<T>::size();
  }
  if (i < C) run(i, C);
}

// The breaks of an ordinary row: at most two.
template <typename T>
inline int64_t ordinary_breaks(int64_t C, int64_t label, int32_t* at) {
  constexpr int64_t kWidth = Vec<T>::size();
  const int64_t of_label = label / kWidth * kWidth, last = C / kWidth * kWidth;
  at[0] = static_cast<int32_t>(of_label);
  at[1] = static_cast<int32_t>(last);
  return 1 + (last < C && last != of_label);
}

// The vector at `i` of a row, `fill` beyond its end.
template <typename T>
inline Vec<T> load_filled(const T* row, int64_t i, int64_t C, T fill) {
  const int64_t count = C - i;
  if (count >= Vec<T>::size()) return Vec<T>::loadu(row + i);
  return Vec<T>::set(Vec<T>(fill), Vec<T>::loadu(row + i, static_cast<int>(count)), count);
}

// The same with the label's own logit taken out: sums and maxima run over the other classes, -infinity adding nothing.
template <typename T>
inline Vec<T> load_others(const Row<T>& row, int64_t i) {
  const Vec<T> x = load_filled(row.logits, i, row.C, -std::numeric_limits<T>::infinity());
  return Vec<T>::blendv(x, Vec<T>(-std::numeric_limits<T>::infinity()),
                        Vec<T>::arange(T(0), T(1)) == Vec<T>(static_cast<T>(row.label - i)));
}

// f(offset, accumulator) for every vector of a row. Two accumulators, so that one addition need not wait for the last.
template <typename T, typename F>
inline void for_vectors(int64_t C, F&& f) {
  constexpr int64_t kWidth = Vec<T>::size();
  int64_t i = 0;
  for (; i + 2 * kWidth <= C; i += 2 * kWidth) {
    f(i, 0);
    f(i + kWidth, 1);
  }
  for (; i < C; i += kWidth) f(i, 0);
}

// How many classes are above the label.
template <typename T>
inline int64_t rank_of(const Row<T>& row) {
  using V = Vec<T>;
  const V threshold(row.label_value);
  V count[2] = {V(T(0)), V(T(0))};
  int64_t whole = 0;
  if (row.sparse) {
    for (int64_t k = 0; k < row.breaks.count; ++k)
      count[0] = count_above(count[0], load_others(row, row.breaks.at[k]), threshold);
    whole = row.C;
  } else {
    whole = row.C / V::size() * V::size();
    const int64_t ahead = is_longer<T>(row.C, kLongRowBytes) ? kAhead : 0;
    for_vectors<T>(whole, [&](int64_t i, int k) {
      prefetch(reinterpret_cast<const char*>(row.logits + i + ahead));
      count[k] = count_above(count[k], V::loadu(row.logits + i), threshold);
    });
  }
  int64_t rank = static_cast<int64_t>(sum_of(count[0] + count[1]));
  for (int64_t i = whole; i < row.C; ++i) rank += row.logits[i] > row.label_value;
  return rank;
}

// The largest of the others.
template <typename T>
inline T max_of_others(const Row<T>& row) {
  using V = Vec<T>;
  V largest(row.sparse ? row.tail : -std::numeric_limits<T>::infinity());
  for_runs<T>(
      row.C, row.breaks,
      [&](int64_t begin, int64_t end) {
        if (!row.sparse)
          for (int64_t i = begin; i < end; i += V::size()) largest = at::vec::clamp_min(V::loadu(row.logits + i), largest);
      },
      [&](int64_t i) { largest = at::vec::clamp_min(load_others(row, i), largest); });
  return max_of(largest);
}

template <typename T>
inline bool has_nan(const T* row, int64_t C) {
  using V = Vec<T>;
  V seen(T(0));
  for_vectors<T>(C, [&](int64_t i, int) { seen = seen + (load_filled(row, i, C, T(0)).isnan() & V(T(1))); });
  return sum_of(seen) > T(0);
}

// Mean and unbiased standard deviation of two rows at once. The values are taken relative to the row's first, so that a
// constant row has a standard deviation of exactly 0.
template <typename T>
inline std::pair<MeanStd<T>, MeanStd<T>> mean_std_of(const T* a, const T* b, int64_t C) {
  using V = Vec<T>;
  const T n = static_cast<T>(C), filled = static_cast<T>((V::size() - C % V::size()) % V::size());
  const int64_t whole = C / V::size() * V::size();
  const auto load = [&](const T* row, int64_t i) { return i < whole ? V::loadu(row + i) : load_filled(row, i, C, row[0]); };
  const V shift_a(a[0]), shift_b(b[0]);
  V sum_a[2] = {V(T(0)), V(T(0))}, sum_b[2] = {V(T(0)), V(T(0))};
  for_vectors<T>(C, [&](int64_t i, int k) {
    sum_a[k] = sum_a[k] + (load(a, i) - shift_a);
    sum_b[k] = sum_b[k] + (load(b, i) - shift_b);
  });
  const T offset_a = sum_of(sum_a[0] + sum_a[1]) / n, offset_b = sum_of(sum_b[0] + sum_b[1]) / n;
  const V centre_a(offset_a), centre_b(offset_b);
  V squares_a[2] = {V(T(0)), V(T(0))}, squares_b[2] = {V(T(0)), V(T(0))};
  for_vectors<T>(C, [&](int64_t i, int k) {
    const V d_a = load(a, i) - shift_a - centre_a, d_b = load(b, i) - shift_b - centre_b;
    squares_a[k] = at::vec::fmadd(d_a, d_a, squares_a[k]);
    squares_b[k] = at::vec::fmadd(d_b, d_b, squares_b[k]);
  });
  const auto std_of = [&](const V* squares, T offset) {
    const T total = sum_of(squares[0] + squares[1]) - filled * offset * offset;    // the filling's own share
    return C > 1 && total > T(0) ? std::sqrt(total / (n - T(1))) : total - total;  // 0, or NaN for a row with one
  };
  return {{a[0] + offset_a, std_of(squares_a, offset_a)}, {b[0] + offset_b, std_of(squares_b, offset_b)}};
}

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
