// Tail::Bucket: a row as k + 2 classes, which the ordinary row loop takes: the k, the label, the bucket.
//
// The teacher comes so (reference.bucket_teacher), corrected. The student's label is one of the k; or, corrected, a class of
// its own; or, without a correction, in the bucket. What is left out holds -infinity on both sides. With R the logsumexp of the
// student's logits in the bucket and g the gradient by the k + 2, a class in the bucket has the gradient g_R exp(s - R). The
// cross-entropy is that over all C classes.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "row.h"
#include "row_io.h"
#include "row_loss.h"
#include "rows.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

void loss_rows(const RowLoop&, int64_t, int64_t, SORTKD_ACC);

// The first of a vector's lanes, converted.
template <typename V, typename X>
inline V load_some(const X* x, int count) {
  using T = typename V::value_type;
  if constexpr (std::is_same_v<X, T>) {
    return count == V::size() ? V::loadu(x) : V::loadu(x, count);
  } else {
    T values[V::size()] = {};
    for (int i = 0; i < count; ++i) values[i] = static_cast<T>(x[i]);
    return V::loadu(values);
  }
}

// exps = exp(logits - reference), and the sum over the vectors between the breaks, in blocks as in `exponentiate`. `grad`: what
// will be written next, or null.
template <typename X, typename T>
inline T exponentials_of(const X* logits, int64_t C, T reference, const Breaks& breaks, const char* grad, int64_t grad_bytes,
                         T* exps) {
  using V = Vec<T>;
  const T log2e = static_cast<T>(kLog2e);
  const Exponent<T, false> exponent{reference, log2e};
  const int64_t ahead = is_longer<T>(C, kLongRowBytes) ? kAhead : 0;
  const int64_t grad_step = grad ? grad_bytes : 0;
  if (!grad) grad = reinterpret_cast<const char*>(exps);
  V total(T(0));
  for_runs<T>(
      C, breaks,
      [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block += 64 * V::size()) {
          const int64_t block_end = std::min(block + 64 * V::size(), end);
          V of_block(T(0));
          const auto add = [&](const V& x, int64_t i) {
            const V e = exp2(exponent(x));
            e.store(exps + i);
            of_block = of_block + e;
          };
          int64_t i = block;
          if constexpr (is_half<X>)
            for (; i + 2 * V::size() <= block_end; i += 2 * V::size()) {
              prefetch(reinterpret_cast<const char*>(logits + i + ahead));
              prefetch_to_write(grad + i * grad_step);
              const auto [low, high] = to_floats(at::vec::Vectorized<X>::loadu(logits + i));
              add(low, i);
              add(high, i + V::size());
            }
          for (; i < block_end; i += V::size()) {
            prefetch(reinterpret_cast<const char*>(logits + i + ahead));
            prefetch_to_write(grad + i * grad_step);
            add(load_some<V>(logits + i, V::size()), i);
          }
          total = total + of_block;
        }
      },
      [&](int64_t i) {
        const int count = static_cast<int>(std::min<int64_t>(V::size(), C - i));
        exp2(exponent(load_some<V>(logits + i, count))).store(exps + i, count);
      });
  return sum_of(total);
}

template <typename T>
inline T log_sum_exp(const T* x, int64_t n) {
  using V = Vec<T>;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  V largest(kLowest), sum(T(0));
  for_vectors<T>(n, [&](int64_t i, int) { largest = at::vec::clamp_min(load_filled(x, i, n, kLowest), largest); });
  const T top = max_of(largest);
  if (top == kLowest) return std::count_if(x, x + n, [](T v) { return v != v; }) ? std::numeric_limits<T>::quiet_NaN() : top;
  const Difference<T> exponent{top, static_cast<T>(kLog2e)};
  for_vectors<T>(n, [&](int64_t i, int) { sum = sum + exp2(exponent(load_filled(x, i, n, kLowest))); });
  return top + std::log(sum_of(sum));
}

// exp(a - b), 0 for a b of -infinity.
template <typename T>
inline T ratio_of(T a, T b) {
  return b == -std::numeric_limits<T>::infinity() ? T(0) : std::exp(a - b);
}

template <typename X, typename T>
struct BucketRow {
  const X* logits;
  T* exps;
  const char* written;  // where its gradient goes, if the caches hold it until then
  int64_t place;        // of the label among the k + 2
  T reference;          // exponentials are taken relative to this logit
  T log_others;         // logsumexp of all classes but the label
  T others;             // their probability
};

template <typename T>
struct BucketRows {
  static constexpr T kLowest = -std::numeric_limits<T>::infinity();
  static constexpr int64_t kNoLabel = -100;
  const RowLoop& loop;
  const LossArgs& args = loop.args;
  const int64_t C = args.layout.C, inner = args.layout.inner, k = args.k, width = k + 2;

  void run(int64_t begin, int64_t end) const {
    const bool half = args.student_dtype == Dtype::BFloat16 || args.student_dtype == Dtype::Half;
    if (inner > 1 || (args.student_dtype != kDtype<T> && !(half && kDtype<T> == Dtype::Float)))
      return run_rows<T, false>(begin, end);
    with_dtype(args.student_dtype, [&](auto tag) {
      using X = decltype(tag);
      if constexpr (std::is_same_v<X, T> || (is_half<X> && std::is_same_v<T, float>)) run_rows<X, true>(begin, end);
    });
  }

  // `direct`: the logits are read, and the gradient is written, where the caller has them.
  template <typename X, bool direct>
  void run_rows(int64_t begin, int64_t end) const {
    constexpr int64_t kWidth = Vec<T>::size(), kMostRows = 16, kBytes = 16 << 10;
    const int64_t padded = (C + kWidth - 1) / kWidth * kWidth;
    const int64_t tile = inner > 1 ? kMostRows : std::clamp<int64_t>(kBytes / (C * sizeof(T)), 1, kMostRows);
    const std::unique_ptr<T[]> memory(new T[tile * padded]), small(new T[3 * tile * width]);
    const std::unique_ptr<X[]> converted(direct ? nullptr : new X[tile * padded]);
    const std::unique_ptr<int64_t[]> places(new int64_t[tile]);
    const std::unique_ptr<int32_t[]> breaks(new int32_t[k + 8]);
    const std::unique_ptr<uint8_t[]> seen(new uint8_t[padded / kWidth + 8]);
    T* const exps = memory.get();
    X* const logits = converted.get();
    T *const student = small.get(), *const teacher = student + tile * width, *const grad = teacher + tile * width;
    BucketRow<X, T> rows[kMostRows];
    for (int64_t n = begin, count; n < end; n += count) {
      count = std::min(tile, inner == 1 ? end - n : std::min(end - n, inner - n % inner));
      if constexpr (!direct)
        with_dtype(args.student_dtype, [&](auto tag) {
          load_tile(static_cast<const decltype(tag)*>(args.student) + offset(n), C, inner, count, logits, padded);
        });
      with_dtype(args.teacher_dtype, [&](auto tag) {
        load_row(static_cast<const decltype(tag)*>(args.teacher) + n * width, count * width, teacher);
      });
      for (int64_t r = 0; r < count; ++r) {
        rows[r].logits = direct ? static_cast<const X*>(args.student) + (n + r) * C : logits + r * padded;
        rows[r].exps = exps + r * padded;
        rows[r].written = nullptr;
        if (args.grad_student && direct && std::is_same_v<X, T> && args.grad_student != args.student) {
          // Where they will be multiplied, with no way through a buffer.
          rows[r].exps = static_cast<T*>(args.grad_student) + (n + r) * C;
          rows[r].written = reinterpret_cast<const char*>(rows[r].exps + kAhead);
        } else if (args.grad_student && inner == 1 && !is_longer<T>(C, kHugeRowBytes)) {
          rows[r].written = element(args.grad_student, args.student_dtype, (n + r) * C);
        }
        gather(n + r, rows[r], student + r * width, breaks.get(), seen.get());
        places[r] = rows[r].place;
      }
      run_small(n, count, student, teacher, places.get(), grad);
      if (!args.grad_student) continue;
      for (int64_t r = 0; r < count; ++r) {
        X* out = direct ? static_cast<X*>(args.grad_student) + (n + r) * C : logits + r * padded;
        spread(n + r, rows[r], student + r * width, grad + r * width, out);
      }
      if constexpr (!direct)
        with_dtype(args.student_dtype, [&](auto tag) {
          store_tile(logits, padded, C, inner, count, static_cast<decltype(tag)*>(args.grad_student) + offset(n));
        });
    }
  }

  int64_t offset(int64_t n) const { return inner == 1 ? n * C : n / inner * C * inner + n % inner; }
  ClassIndices indices_of(int64_t n) const { return ClassIndices{args.teacher_indices, args.int64_indices}.from(n * k); }

  // The student's k + 2 logits.
  template <typename X>
  void gather(int64_t n, BucketRow<X, T>& row, T* small, int32_t* at, uint8_t* seen) const {
    const int64_t label = args.target[n];
    row.place = kNoLabel;
    row.log_others = kLowest;
    if (args.rank) args.rank[n] = 0;  // the teacher's side, which is not here, knows it
    T* const ce = loop.ce ? static_cast<T*>(loop.ce) + n : nullptr;
    if (ce) *ce = T(0);
    if (label == args.config.ignore_index) return;
    const ClassIndices indices = indices_of(n);
    const X* const logits = row.logits;
    const T of_label = static_cast<T>(logits[label]);
    row.place = k;
    for (int64_t j = 0; j < k; ++j) {
      small[j] = static_cast<T>(logits[indices[j]]);
      if (indices[j] != label) continue;
      if (row.place == k)
        row.place = j;
      else
        small[j] = kLowest;
    }
    const Breaks breaks{at, top_k_breaks<T>(indices, k, C, label, seen, at)};
    T sum = std::numeric_limits<T>::quiet_NaN();
    if (std::isfinite(of_label)) sum = exponentiate(row, indices, label, of_label, breaks);
    if (!well_scaled(sum)) {
      // The exponentials' place holds the others while their maximum is looked for.
      const auto hide = [&](int64_t c) { row.exps[c] = kLowest; };
      load_row(logits, C, row.exps);
      hide(label);
      for (int64_t j = 0; j < k; ++j) hide(indices[j]);
      const T top = *std::max_element(row.exps, row.exps + C);
      sum = exponentiate(row, indices, label, top == kLowest ? T(0) : top, breaks);
    }
    T& rest = small[k + 1];
    rest = sum == T(0) ? kLowest : row.reference + std::log(sum);
    small[k] = kLowest;
    if (ce) {
      const T kept = std::exchange(small[row.place], kLowest);
      row.log_others = log_sum_exp(small, width);
      small[row.place] = kept;
      const Binary<T> q = from_log_odds<ScalarMath<T>>(of_label - row.log_others);
      row.others = q.others;
      *ce = of_label == -kLowest ? std::numeric_limits<T>::quiet_NaN() : -q.log_label;
    }
    if (row.place < k) return;
    if (args.config.correction != Correction::None) {
      small[k] = of_label;
      return;
    }
    row.place = k + 1;
    if (rest == kLowest)
      rest = of_label;
    else if (of_label != kLowest)
      rest = std::max(rest, of_label) + std::log1p(std::exp(-std::fabs(rest - of_label)));
  }

  // Returns the sum over the classes that are neither the label nor among the k, whose exponentials are 0 then.
  template <typename X>
  T exponentiate(BucketRow<X, T>& row, const ClassIndices& indices, int64_t label, T reference, const Breaks& breaks) const {
    row.reference = reference;
    const T between = exponentials_of(row.logits, C, reference, breaks, row.written, bytes_of(args.student_dtype), row.exps);
    row.exps[label] = T(0);
    for (int64_t j = 0; j < k; ++j) row.exps[indices[j]] = T(0);
    Vec<T> at_breaks(T(0));
    for (int64_t b = 0; b < breaks.count; ++b) at_breaks = at_breaks + load_filled(row.exps, breaks.at[b], C, T(0));
    return between + sum_of(at_breaks);
  }

  // Plain KD of the small rows.
  void run_small(int64_t n, int64_t count, const T* student, const T* teacher, const int64_t* places, T* grad) const {
    LossArgs small = args;
    small.config.tail = Tail::Renormalize;
    small.config.correction = Correction::None;
    small.config.ignore_index = kNoLabel;
    small.config.ce_weight = 0;
    small.config.parts = false;
    small.layout = {count, width, 1};
    small.student_dtype = small.teacher_dtype = kDtype<T>;
    small.student = student;
    small.teacher = teacher;
    small.teacher_indices = nullptr;
    small.k = 0;
    small.target = places;
    if (args.temperature) small.temperature = static_cast<const T*>(args.temperature) + n * args.temperature_stride;
    if (args.grad_output) small.grad_output = static_cast<const T*>(args.grad_output) + n * args.grad_output_stride;
    if (args.grad_temperature) small.grad_temperature = static_cast<T*>(args.grad_temperature) + n;
    small.rank = nullptr;
    small.grad_student = args.grad_student ? grad : nullptr;
    loss_rows(RowLoop{small, static_cast<T*>(loop.kd) + n, nullptr, loop.mean_scale}, 0, count, T(0));
  }

  // The gradient by all classes from that by the k + 2. `out` may be the student's own memory.
  template <typename X>
  void spread(int64_t n, const BucketRow<X, T>& row, const T* small, const T* grad, X* out) const {
    using V = Vec<T>;
    if (row.place == kNoLabel) {
      std::fill(out, out + C, X(0));
      return;
    }
    const int64_t label = args.target[n];
    const ClassIndices indices = indices_of(n);
    T on_ce = T(0), at_label = row.place < width - 1 ? grad[row.place]
                                                     : grad[k + 1] * ratio_of(static_cast<T>(row.logits[label]), small[k + 1]);
    if (args.config.ce_weight != 0) {
      const T scale = static_cast<T>(loop.mean_scale * args.config.ce_weight) *
                      (args.grad_output ? static_cast<const T*>(args.grad_output)[n * args.grad_output_stride] : T(1));
      on_ce = scale * row.others;
      at_label -= on_ce;
    }
    const T in_bucket = grad[k + 1] * ratio_of(row.reference, small[k + 1]) + on_ce * ratio_of(row.reference, row.log_others);
    const V factor(in_bucket);
    constexpr int64_t kStep = at::vec::Vectorized<X>::size();
    const int64_t whole = C / kStep * kStep, ahead = is_longer<T>(C, kHugeRowBytes) ? kAhead : 0;
    const auto scaled = [&](int64_t i) { return V::loadu(row.exps + i) * factor; };
    for (int64_t i = 0; i < whole; i += kStep) {
      prefetch_to_write(reinterpret_cast<const char*>(out + i + ahead));
      if constexpr (is_half<X>)
        from_floats<X>(scaled(i), scaled(i + V::size())).store(out + i);
      else
        scaled(i).store(out + i);
    }
    for (int64_t i = whole; i < C; ++i) out[i] = static_cast<X>(row.exps[i] * in_bucket);
    for (int64_t j = 0; j < k; ++j)
      out[indices[j]] = static_cast<X>(grad[j] + (on_ce == T(0) ? T(0) : on_ce * ratio_of(small[j], row.log_others)));
    out[label] = static_cast<X>(at_label);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
