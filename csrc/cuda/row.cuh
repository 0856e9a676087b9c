// What every row kernel does before and after it goes over the classes: a row's label and weights, its losses, and the
// coefficients of its gradient.
#pragma once

#include <cassert>

#include "../row_math.h"
#include "group.cuh"
#include "params.h"

namespace sortkd {
namespace cuda {

template <typename T>
struct RowHead {
  int64_t row;
  int64_t offset;  // of the row's first class, in elements
  bool inside;     // there is such a row
  bool counts;     // ... and it has a label
  int label;
  T temperature;
  T factor;        // what multiplies its gradient: upstream gradient, and the mean's 1 / n
};

// The rows that count, over all blocks that counted. Every lane of the warp must come here.
__device__ __forceinline__ unsigned counted_rows(const unsigned* counts, int blocks) {
  if (blocks == 1) return counts[0];
  Count n{0};
#pragma unroll 1
  for (int b = static_cast<int>(lane_id()); b < blocks; b += 32) n.n += static_cast<int>(counts[b]);
  for (int offset = 16; offset >= 1; offset /= 2) n.merge(shuffled_xor(n, offset));
  return static_cast<unsigned>(n.n);
}

template <typename T>
__device__ __forceinline__ RowHead<T> read_head(const LossParams<T>& p, int64_t row) {
  RowHead<T> head{row, row * p.C, row < p.rows, false, 0, T(1), T(1)};
  if (p.inner > 1) head.offset = row / p.inner * p.inner * p.C + row % p.inner;
  if (p.counts) {
    // No row counts: there is no gradient either, and 0 keeps 0 * inf out of it.
    const unsigned n = counted_rows(p.counts, p.count_blocks);
    head.factor = n ? T(1) / static_cast<T>(n) : T(0);
  }
  if (!head.inside) return head;
  const int64_t label = p.target[row];
  head.counts = label != p.ignore_index;
  if (!head.counts) return head;
  assert(label >= 0 && label < p.C && "sortkd_kernels: a label is outside [0, C) and is not ignore_index");
  head.label = static_cast<int>(label);
  head.temperature = p.temperature ? p.temperature[row * p.temperature_stride] : p.temperature_value;
  if (p.upstream) head.factor *= p.upstream[row * p.upstream_stride];
  return head;
}

// Exponents of both sides in bits: (logit - reference) * scale.
template <typename T>
struct Exponents {
  T student, teacher;  // log2(e) times the inverse temperature of the side, and its inverse deviation
  T plain;             // from the student's exponent to its own at temperature 1
  int power;
  T reference_student, reference_teacher;
};

// Mean and deviation of a side, for standardization.
template <typename T>
struct Spread {
  T mean, deviation;
};

template <bool general, typename T>
__device__ __forceinline__ Exponents<T> exponents_of(const LossParams<T>& p, T temperature, T deviation_student,
                                                     T deviation_teacher) {
  Exponents<T> x{};
  T inverse = T(1) / temperature, inverse_teacher = inverse;
  if (general && p.standardize) {
    inverse /= deviation_student + static_cast<T>(kStandardizeEps);
    inverse_teacher /= deviation_teacher + static_cast<T>(kStandardizeEps);
  }
  x.student = inverse * static_cast<T>(kLog2e);
  x.teacher = inverse_teacher * static_cast<T>(kLog2e);
  x.plain = T(1) / inverse;
  x.power = p.power;
  return x;
}

// grad = on_student e_s - on_teacher e_t + on_plain e_1 - along (v_s - v_mean), and the label's entry on its own.
template <typename T>
struct Coefficients {
  T on_student, on_teacher, on_plain, at_label;
  T along, v_mean;  // the way through the student's standard deviation
};

// `general`: the kernel makes what only Passes::General has, z-scores and the derivative by the temperature.
// Store the scalars of a row, by one of its threads, and return its coefficients. `student_label` is the logit.
template <bool general, typename T>
__device__ __forceinline__ Coefficients<T> finish_row(const LossParams<T>& p, const RowHead<T>& head,
                                                      const RowSums<T>& sums, const Exponents<T>& x,
                                                      const Spread<T>& spread, T student_label, int rank, bool writer) {
  const RowTerms<T> terms = row_terms(sums, row_logs(sums, p.with_ce), head.temperature, p.decoupled, p.alpha, p.beta, p.with_ce, general);
  if (writer) {
    p.kd[head.row] = head.counts ? terms.kd : T(0);
    if (p.with_ce) p.ce[head.row] = head.counts ? terms.ce : T(0);
    if (p.rank) p.rank[head.row] = head.counts ? rank : 0;
    if (p.loss) {
      T loss = p.kd_weight * terms.kd;
      // Asked for as a part only, an infinite cross-entropy leaves the loss alone.
      if (p.ce_weight != T(0)) loss += p.ce_weight * terms.ce;
      p.loss[head.row] = head.counts ? loss : T(0);
    }
    if (general && p.grad_temperature)
      p.grad_temperature[head.row] = head.counts ? head.factor * p.kd_weight * terms.grad_temperature : T(0);
  }
  // d loss / d s = (T^2 dF/du) (du/ds), and under standardization the way through the student's deviation.
  const T inverse = x.student * static_cast<T>(kLn2);
  const T kd_scale = head.factor * p.kd_weight * head.temperature * head.temperature * inverse;
  const T ce_scale = head.factor * p.ce_weight;
  Coefficients<T> c{};
  c.on_student = kd_scale * terms.on_student;
  c.on_teacher = kd_scale * terms.on_teacher;
  c.on_plain = ce_scale * terms.on_ce;
  c.at_label = kd_scale * terms.at_label + ce_scale * terms.ce_at_label;
  if (general && p.standardize && spread.deviation > T(0)) {
    const T deviation = spread.deviation + static_cast<T>(kStandardizeEps);
    const T along = kd_scale * terms.u_dot_grad / (inverse * static_cast<T>(p.C - 1) * spread.deviation);
    c.along = along * static_cast<T>(kLn2) / (inverse * deviation);  // v counts in bits of u, z in deviations
    c.v_mean = (spread.mean - x.reference_student) * x.student;
    c.at_label -= along * (student_label - spread.mean) / deviation;
  }
  return c;
}

}  // namespace cuda
}  // namespace sortkd
