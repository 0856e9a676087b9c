// The two vector passes over a row: exponentials and sums, then the gradient. Every method of the package is these two
// loops with other sums and other coefficients.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../row_math.h"
#include "order.h"
#include "simd.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

// How the cross-entropy comes by the student's exponential at temperature 1: not at all; as a power of the one at T, for
// exp(s) = exp(s/4)^4; or by an exponential of its own.
enum class CeExp { None, Power1, Power2, Power4, Own };

template <typename T>
struct Exponents {
  T student, teacher;  // log2(e) times the inverse temperature of the side
  T ce;                // from the student's v to its v at temperature 1
};

// What the caches are to fetch while a row is computed: what comes next of each side, and where this row's gradient will be
// written. Without it the loops alternate between waiting for memory and arithmetic.
struct Ahead {
  const char *student, *teacher;
  int64_t student_bytes, teacher_bytes;  // of an element
  const char* grad;
  int64_t grad_bytes;
};

template <CeExp ce_exp, typename T>
inline Vec<T> exp_at_1(const Vec<T>& e, const Vec<T>& v, T to_ce) {
  if constexpr (ce_exp == CeExp::Power1) return e;
  if constexpr (ce_exp == CeExp::Power2) return e * e;
  if constexpr (ce_exp == CeExp::Power4) return (e * e) * (e * e);
  return exp2(v * Vec<T>(to_ce));
}

template <typename T>
struct VectorSums {
  using V = Vec<T>;
  V student{T(0)}, teacher{T(0)}, cross{T(0)}, ce{T(0)};
  V moment_student{T(0)}, moment_teacher{T(0)}, moment_cross{T(0)};
  VectorSums& operator+=(const VectorSums& x) {
    student = student + x.student;
    teacher = teacher + x.teacher;
    cross = cross + x.cross;
    ce = ce + x.ce;
    moment_student = moment_student + x.moment_student;
    moment_teacher = moment_teacher + x.moment_teacher;
    moment_cross = moment_cross + x.moment_cross;
    return *this;
  }
};

// The type of a row's sums: those of `moments` end in differences of nearly equal terms.
template <typename T, bool moments>
using SumType = std::conditional_t<moments, double, T>;

template <CeExp ce_exp, typename T, typename A>
inline void add_lanes(RowSums<A>& sums, const VectorSums<T>& lanes) {
  sums.z_student += sum_of(lanes.student);
  sums.z_teacher += sum_of(lanes.teacher);
  sums.cross += sum_of(lanes.cross);
  if constexpr (ce_exp != CeExp::None) sums.z_ce += sum_of(lanes.ce);
  if constexpr (std::is_same_v<A, double>) {
    sums.moment_student += sum_of(lanes.moment_student);
    sums.moment_teacher += sum_of(lanes.moment_teacher);
    sums.moment_cross += sum_of(lanes.moment_cross);
  }
}

// Takes the exponentials of both rows without the label, relative to the rows' references, and returns their sums.
template <typename T, CeExp ce_exp, bool moments, bool sparse>
inline RowSums<SumType<T, moments>> exponentiate(const Row<T>& student, const Row<T>& teacher, const Exponents<T>& scale,
                                                 const Ahead& ahead) {
  using V = Vec<T>;
  // Copies: as far as the compiler knows, a stored exponential may overwrite anything that it has to be fetched from.
  const T *const logits_s = student.logits, *const logits_t = teacher.logits;
  T *const exps_s = student.exps, *const exps_t = teacher.exps;
  const Exponent<T, moments> exponent_s{student.reference, scale.student}, exponent_t{teacher.reference, scale.teacher};
  const T to_ce = scale.ce;
  const Ahead fetch = ahead;
  const auto add = [&](VectorSums<T>& sums, const V& v_s, const V& e_s, const V& v_t, const V& e_t) {
    sums.student = sums.student + e_s;
    sums.teacher = sums.teacher + e_t;
    const V gap = v_t - v_s;
    sums.cross = add_nonzero(sums.cross, e_t, gap);
    if constexpr (ce_exp != CeExp::None) sums.ce = sums.ce + exp_at_1<ce_exp>(e_s, v_s, to_ce);
    if constexpr (moments) {
      sums.moment_student = add_nonzero(sums.moment_student, e_s, v_s);
      sums.moment_teacher = add_nonzero(sums.moment_teacher, e_t, v_t);
      sums.moment_cross = add_nonzero(sums.moment_cross, e_t, gap * v_t);
    }
  };
  const auto exponential = [](const V& v, T* place) {
    const V e = exp2(v);
    e.store(place);
    return e;
  };
  const V v_tail = sparse ? exponent_t(V(teacher.tail)) : V(T(0)), e_tail = exp2(v_tail);
  RowSums<SumType<T, moments>> sums{};
  VectorSums<T> total;
  for_runs<T>(
      student.C, teacher.breaks,
      [&](int64_t begin, int64_t end) {
        // Sums of short blocks first: a running sum over 10^5 terms would lose five digits.
        for (int64_t block = begin; block < end; block += 64 * V::size()) {
          const int64_t block_end = std::min(block + 64 * V::size(), end);
          VectorSums<T> of_block;
          for (int64_t i = block; i < block_end; i += V::size()) {
            prefetch(fetch.student + i * fetch.student_bytes);
            if constexpr (!sparse) prefetch(fetch.teacher + i * fetch.teacher_bytes);
            prefetch_to_write(fetch.grad + i * fetch.grad_bytes);
            const V v_s = exponent_s(V::loadu(logits_s + i));
            const V e_s = exponential(v_s, exps_s + i);
            if constexpr (sparse) {
              add(of_block, v_s, e_s, v_tail, e_tail);
            } else {
              const V v_t = exponent_t(V::loadu(logits_t + i));
              add(of_block, v_s, e_s, v_t, exponential(v_t, exps_t + i));
            }
          }
          if constexpr (moments)
            add_lanes<ce_exp>(sums, of_block);
          else
            total += of_block;
        }
      },
      [&](int64_t i) {
        const V v_s = exponent_s(load_others(student, i));
        const V v_t = exponent_t(load_others(teacher, i));
        add(total, v_s, exponential(v_s, exps_s + i), v_t, exponential(v_t, exps_t + i));
      });
  add_lanes<ce_exp>(sums, total);
  constexpr auto ln2 = static_cast<SumType<T, moments>>(kLn2);
  sums.cross *= ln2;
  sums.v_label_student = exponent_s(student.label_value) * ln2;
  sums.v_label_teacher = exponent_t(teacher.label_value) * ln2;
  if constexpr (ce_exp != CeExp::None) sums.v_label_ce = sums.v_label_student * to_ce;
  if constexpr (moments) {
    sums.moment_student *= ln2;
    sums.moment_teacher *= ln2;
    sums.moment_cross *= ln2 * ln2;
  }
  return sums;
}

// A sum of exponentials far enough from both ends of the range that nothing in it overflowed, and that what was too small
// to be represented is below its rounding.
template <typename T>
inline bool well_scaled(T z) {
  return z > T(0x1p-80) && z < T(0x1p100);
}

// Exponentials relative to the label's own logits first, which need no search for a maximum: a label is seldom e^55 away from
// the rest. Where it is, or is infinite, or where sums of squares want small terms (`centred`), relative to the maxima.
template <typename T, CeExp ce_exp, bool moments, bool sparse>
inline RowSums<SumType<T, moments>> row_sums(Row<T>& student, Row<T>& teacher, const Exponents<T>& scale, const Ahead& ahead,
                                             bool centred) {
  if (!centred && std::isfinite(student.label_value) && std::isfinite(teacher.label_value)) {
    student.reference = student.label_value;
    teacher.reference = teacher.label_value;
    const auto sums = exponentiate<T, ce_exp, moments, sparse>(student, teacher, scale, ahead);
    if (well_scaled(sums.z_student) && well_scaled(sums.z_teacher) && (ce_exp == CeExp::None || well_scaled(sums.z_ce)))
      return sums;
  }
  // A maximum of -infinity has nothing to be relative to, and would turn -infinity into NaN.
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  for (Row<T>* row : {&student, &teacher}) {
    row->reference = max_of_others(*row);
    if (row->reference == kLowest) row->reference = T(0);
  }
  return exponentiate<T, ce_exp, moments, sparse>(student, teacher, scale, ahead);
}

// The logarithms of a tile of rows, a row a lane: one by one they would take as long as the classes of a short row.
template <typename T>
struct VectorMath {
  using V = Vec<T>;
  static V exp(const V& x) { return x.exp(); }
  static V log(const V& x) { return x.log(); }
  static V abs(const V& x) { return x.abs(); }
  static V choose(const V& condition, const V& yes, const V& no) { return V::blendv(no, yes, condition); }
};

template <typename T, typename State>
inline void tile_logs(State* rows, int64_t count, bool with_ce) {
  using V = Vec<T>;
  constexpr int64_t kWidth = V::size();
  for (int64_t first = 0; first < count; first += kWidth) {
    const int64_t lanes = std::min(kWidth, count - first);
    const auto gathered = [&](T RowSums<T>::* field) {
      alignas(64) T values[kWidth] = {};
      for (int64_t i = 0; i < lanes; ++i) values[i] = rows[first + i].sums.*field;
      return V::loadu(values);
    };
    using S = RowSums<T>;
    const RowLogs<V> of_lanes = row_logs<V, VectorMath<T>>(gathered(&S::z_student), gathered(&S::z_teacher), gathered(&S::z_ce),
                                                           gathered(&S::v_label_student), gathered(&S::v_label_teacher),
                                                           gathered(&S::v_label_ce), with_ce);
    // Both structs are nothing but their fields, in one order.
    constexpr int kFields = sizeof(RowLogs<T>) / sizeof(T);
    alignas(64) T columns[kFields][kWidth];
    static_assert(sizeof(RowLogs<V>) == sizeof(columns));
    std::memcpy(columns, &of_lanes, sizeof(columns));
    for (int64_t i = 0; i < lanes; ++i) {
      T fields[kFields];
      for (int f = 0; f < kFields; ++f) fields[f] = columns[f][i];
      std::memcpy(&rows[first + i].logs, fields, sizeof(fields));
    }
  }
}

// `grad` may be the student's own memory: each logit is read for the last time just before its place is written.
template <typename T, CeExp ce_exp, bool moments, bool sparse>
inline void write_gradient(const Row<T>& student, const Row<T>& teacher, const Exponents<T>& scale, const Coefficients<T>& c,
                           T mean_student, T* grad) {
  using V = Vec<T>;
  const T *const logits = student.logits, *const exps_s = student.exps, *const exps_t = teacher.exps;
  const V on_student(c.on_student), on_teacher(c.on_teacher), on_ce(c.on_ce), mean(mean_student), minus_dstd(-c.dstd);
  const Exponent<T, moments> exponent_s{student.reference, scale.student}, exponent_t{teacher.reference, scale.teacher};
  const T to_ce = scale.ce;
  const int64_t C = student.C, fetched = is_longer<T>(C, kHugeRowBytes) ? kAhead : 0;
  const auto gradient = [&](const V& e_s, const V& from_teacher, const auto& logit) {
    V g = e_s * on_student - from_teacher;
    V x;
    if constexpr (ce_exp == CeExp::Own || moments) x = logit();
    if constexpr (ce_exp != CeExp::None) g = at::vec::fmadd(exp_at_1<ce_exp>(e_s, exponent_s(x), to_ce), on_ce, g);
    if constexpr (moments) g = add_nonzero(g, minus_dstd, x - mean);
    return g;
  };
  const V tail = sparse ? exp2(exponent_t(V(teacher.tail))) * on_teacher : V(T(0));
  for_runs<T>(
      C, teacher.breaks,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += V::size()) {
          prefetch_to_write(reinterpret_cast<const char*>(grad + i + fetched));
          V from_teacher = tail;
          if constexpr (!sparse) from_teacher = V::loadu(exps_t + i) * on_teacher;
          gradient(V::loadu(exps_s + i), from_teacher, [&] { return V::loadu(logits + i); }).store(grad + i);
        }
      },
      [&](int64_t i) {
        const int count = static_cast<int>(std::min<int64_t>(V::size(), C - i));
        gradient(V::loadu(exps_s + i), V::loadu(exps_t + i) * on_teacher, [&] {
          return V::loadu(logits + i, count);
        }).store(grad + i, count);
      });
  grad[student.label] = c.at_label;
}

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
