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

// How the student's exponential at temperature 1 is had, for the cross-entropy: not at all; as a power of the one at T, for
// exp(s) = exp(s/4)^4; or by an exponential of its own.
enum class Plain { None, Power1, Power2, Power4, Own };

template <typename T>
struct Exponents {
  T student, teacher;  // log2(e) times the inverse temperature of the side
  T plain;             // from the student's v to its v at temperature 1
};

// The next row of each side, to be fetched while this one is computed: the loops alternate between waiting for memory and
// arithmetic, and the hardware's own prefetcher stops at the end of what has been asked for.
struct NextRow {
  const char* student;
  const char* teacher;
  int64_t student_bytes, teacher_bytes;
};

template <Plain plain, typename T>
inline Vec<T> plain_exp(const Vec<T>& e, const Vec<T>& v, T to_plain) {
  if constexpr (plain == Plain::Power1) return e;
  if constexpr (plain == Plain::Power2) return e * e;
  if constexpr (plain == Plain::Power4) return (e * e) * (e * e);
  return exp2(v * Vec<T>(to_plain));
}

template <typename T, Plain plain, bool moments>
constexpr bool keeps_v = plain == Plain::Own || moments;

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2e = 1.44269504088896340736;

// Takes the exponentials of both rows without the label, relative to the rows' references, and returns their sums. `v_row`
// receives the student's v.
template <typename T, Plain plain, bool moments>
inline RowSums<T> exponentiate(const Row<T>& student, const Row<T>& teacher, T* v_row, const Exponents<T>& scale,
                               const NextRow& next) {
  using V = Vec<T>;
  const int64_t C = student.C;
  const V scale_s(scale.student), scale_t(scale.teacher);
  const V reference_s(student.reference), reference_t(teacher.reference);
  V total_s(T(0)), total_t(T(0)), total_cross(T(0)), total_plain(T(0));
  V moment_s(T(0)), moment_t(T(0)), moment_cross(T(0));
  // Sums of short blocks first: a running sum over 10^5 terms would lose five digits.
  constexpr int64_t kBlock = 64 * V::size();
  for (int64_t block = 0; block < C; block += kBlock) {
    const int64_t end = std::min(block + kBlock, C);
    V sum_s(T(0)), sum_t(T(0)), sum_cross(T(0)), sum_plain(T(0));
    V sum_ms(T(0)), sum_mt(T(0)), sum_mc(T(0));
    for (int64_t i = block; i < end; i += V::size()) {
      if (next.student) {
        prefetch(next.student + i * next.student_bytes);
        prefetch(next.teacher + i * next.teacher_bytes);
      }
      // The difference first: a fused x * scale - c would save an operation, and the digits of logits with a large offset.
      const V v_s = (load_others(student.logits, i, C, student.label) - reference_s) * scale_s;
      const V v_t = (load_others(teacher.logits, i, C, teacher.label) - reference_t) * scale_t;
      const V e_s = exp2(v_s), e_t = exp2(v_t);
      e_s.store(student.exps + i);
      e_t.store(teacher.exps + i);
      sum_s = sum_s + e_s;
      sum_t = sum_t + e_t;
      const V gap = v_t - v_s;
      sum_cross = add_nonzero(sum_cross, e_t, gap);
      if constexpr (keeps_v<T, plain, moments>) v_s.store(v_row + i);
      if constexpr (plain != Plain::None) sum_plain = sum_plain + plain_exp<plain>(e_s, v_s, scale.plain);
      if constexpr (moments) {
        sum_ms = add_nonzero(sum_ms, e_s, v_s);
        sum_mt = add_nonzero(sum_mt, e_t, v_t);
        sum_mc = add_nonzero(sum_mc, e_t, gap * v_t);
      }
    }
    total_s = total_s + sum_s;
    total_t = total_t + sum_t;
    total_cross = total_cross + sum_cross;
    total_plain = total_plain + sum_plain;
    moment_s = moment_s + sum_ms;
    moment_t = moment_t + sum_mt;
    moment_cross = moment_cross + sum_mc;
  }
  const T ln2 = static_cast<T>(kLn2);
  RowSums<T> sums{};
  sums.z_student = sum_of(total_s);
  sums.z_teacher = sum_of(total_t);
  sums.cross = sum_of(total_cross) * ln2;
  sums.v_label_student = (student.label_value - student.reference) * scale.student * ln2;
  sums.v_label_teacher = (teacher.label_value - teacher.reference) * scale.teacher * ln2;
  if constexpr (plain != Plain::None) {
    sums.z_plain = sum_of(total_plain);
    sums.v_label_plain = sums.v_label_student * scale.plain;
  }
  if constexpr (moments) {
    sums.moment_student = sum_of(moment_s) * ln2;
    sums.moment_teacher = sum_of(moment_t) * ln2;
    sums.moment_cross = sum_of(moment_cross) * (ln2 * ln2);
  }
  return sums;
}

// A sum of exponentials far enough from both ends of the range that nothing in it overflowed, and that what was too small
// to be represented is below its rounding.
template <typename T>
inline bool well_scaled(T z) {
  return z > static_cast<T>(0x1p-80) && z < static_cast<T>(0x1p100);
}

// Exponentials relative to the label's own logits first, which need no search for a maximum: a label is seldom e^55 away from
// the rest. Where it is, or is infinite, or where sums of squares want small terms (`centred`), relative to the maxima.
template <typename T, Plain plain, bool moments>
inline RowSums<T> row_sums(Row<T>& student, Row<T>& teacher, T* v_row, const Exponents<T>& scale, const NextRow& next,
                           bool centred) {
  if (!centred && std::isfinite(student.label_value) && std::isfinite(teacher.label_value)) {
    student.reference = student.label_value;
    teacher.reference = teacher.label_value;
    const RowSums<T> sums = exponentiate<T, plain, moments>(student, teacher, v_row, scale, next);
    if (well_scaled(sums.z_student) && well_scaled(sums.z_teacher) && (plain == Plain::None || well_scaled(sums.z_plain)))
      return sums;
  }
  // A maximum of -infinity has nothing to be relative to, and would turn -infinity into NaN.
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  for (Row<T>* row : {&student, &teacher}) {
    row->reference = max_of_others(*row);
    if (row->reference == kLowest) row->reference = T(0);
  }
  return exponentiate<T, plain, moments>(student, teacher, v_row, scale, next);
}

// grad[i] = on_student e_s - on_teacher e_t + on_plain e_1 - along (v_s - v_mean), and the label's entry on its own.
template <typename T>
struct Coefficients {
  T on_student, on_teacher, on_plain, at_label;
  T along, v_mean;  // the way through the student's standard deviation
  T plain;          // as in Exponents
};

template <typename T, Plain plain, bool moments>
inline void write_gradient(const Row<T>& student, const Row<T>& teacher, const T* v_row, const Coefficients<T>& c,
                           T* grad) {
  using V = Vec<T>;
  const V on_student(c.on_student), on_teacher(c.on_teacher), on_plain(c.on_plain), along(c.along), v_mean(c.v_mean);
  const auto at = [&](int64_t i) {
    const V e_s = V::loadu(student.exps + i);
    V v;
    if constexpr (keeps_v<T, plain, moments>) v = V::loadu(v_row + i);
    V g = e_s * on_student - V::loadu(teacher.exps + i) * on_teacher;
    if constexpr (plain != Plain::None) g = at::vec::fmadd(plain_exp<plain>(e_s, v, c.plain), on_plain, g);
    if constexpr (moments) g = g - along * (v - v_mean);
    return g;
  };
  int64_t i = 0;
  for (; i + V::size() <= student.C; i += V::size()) at(i).store(grad + i);
  if (i < student.C) at(i).store(grad + i, static_cast<int>(student.C - i));
  grad[student.label] = c.at_label;
}

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
