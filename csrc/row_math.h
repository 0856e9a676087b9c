// The scalar formulas of one row, shared by the CPU and CUDA kernels: from the row's sums to its losses and to the few numbers
// that the gradient pass needs. The derivations are in sortkd_kernels/reference.py.
//
// All sums run over the classes without the label. The label enters through its log odds d = v_y - log z, so 1 - q_y keeps its
// precision where q_y rounds to 1, and one set of sums serves KD and DKD: KD is DKD with alpha = 1 and beta = 1 - p_y.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "loss_config.h"

#if defined(__CUDACC__)
#define SORTKD_HD __host__ __device__ __forceinline__
#else
#define SORTKD_HD inline
#endif

namespace sortkd {

constexpr double kStandardizeEps = 1e-7;
constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2e = 1.44269504088896340736;

// v = (x - reference) / T, in nats; under standardization also divided by the standard deviation.
template <typename T>
struct RowSums {
  T z_student, z_teacher;  // sum exp v
  T cross;                 // sum exp(v_t) (v_t - v_s)
  T v_label_student, v_label_teacher;
  T z_ce, v_label_ce;  // of the student at temperature 1, for the cross-entropy
  T moment_student;    // sum exp(v_s) v_s
  T moment_teacher;    // sum exp(v_t) v_t
  T moment_cross;      // sum exp(v_t) v_t (v_t - v_s)
};

// With F the row's distillation loss divided by T^2, dF/dv_i = on_student exp(v_s) - on_teacher exp(v_t) for i != y and
// at_label for y; d CE/ds_i = on_ce exp(v_ce) and ce_at_label. u_dot_grad = sum v_i dF/dv_i, for the derivatives by the
// temperature and by the standard deviation.
template <typename T>
struct RowTerms {
  T kd, ce;
  T on_student, on_teacher, at_label;
  T on_ce, ce_at_label;
  T u_dot_grad;
  T grad_temperature;
};

// A binary distribution by its log odds, each part at full precision however close to 0 or 1 the other is.
template <typename V>
struct Binary {
  V log_label, log_others;
  V label, others;
};

// How the functions below take their logarithms and make their choices; the CPU has another for the rows of a tile at a time.
template <typename T>
struct ScalarMath {
  static SORTKD_HD T exp(T x) { return std::exp(x); }
  static SORTKD_HD T log(T x) { return std::log(x); }
  static SORTKD_HD T abs(T x) { return std::fabs(x); }
  static SORTKD_HD T choose(bool condition, T yes, T no) { return condition ? yes : no; }
};

template <typename Math, typename V>
SORTKD_HD Binary<V> from_log_odds(V odds) {
  const V one(1), small = Math::exp(V(0) - Math::abs(odds));  // in [0, 1]
  const V whole = one + small;
  // log1p: the correction undoes the rounding of 1 + small.
  const V rest = Math::choose(whole == one, small, Math::log(whole) * (small / (whole - one)));
  const V large = one / whole;
  const auto likely = odds > V(0);
  return {Math::choose(likely, V(0) - rest, odds - rest), Math::choose(likely, V(0) - rest - odds, V(0) - rest),
          Math::choose(likely, large, small * large), Math::choose(likely, small * large, large)};
}

// The logarithms of a row's sums, and its label against the rest: of the student, the teacher and the student at temperature 1.
template <typename V>
struct RowLogs {
  V log_z_student, log_z_teacher;
  Binary<V> q, p, ce;
};

template <typename V, typename Math = ScalarMath<V>>
SORTKD_HD RowLogs<V> row_logs(V z_student, V z_teacher, V z_ce, V label_student, V label_teacher, V label_ce, bool with_ce) {
  RowLogs<V> logs;
  logs.log_z_student = Math::log(z_student);
  logs.log_z_teacher = Math::log(z_teacher);
  logs.q = from_log_odds<Math>(label_student - logs.log_z_student);
  logs.p = from_log_odds<Math>(label_teacher - logs.log_z_teacher);
  logs.ce = with_ce ? from_log_odds<Math>(label_ce - Math::log(z_ce)) : Binary<V>{};
  return logs;
}

template <typename T>
SORTKD_HD RowLogs<T> row_logs(const RowSums<T>& sums, bool with_ce) {
  return row_logs<T>(sums.z_student, sums.z_teacher, sums.z_ce, sums.v_label_student, sums.v_label_teacher, sums.v_label_ce,
                     with_ce);
}

// p * x, and 0 where p is 0 whatever x is: what has no probability takes no part.
template <typename T>
SORTKD_HD T expected(T p, T x) {
  return p == T(0) ? T(0) : p * x;
}

// weight * term, and 0 for an infinite term of weight 0. A NaN stays one.
template <typename T>
SORTKD_HD T weighted(T weight, T term) {
  return weight == T(0) && std::fabs(term) == std::numeric_limits<T>::infinity() ? T(0) : weight * term;
}

// sum / z, and 0 for the mean over no class.
template <typename T>
SORTKD_HD T mean_of(T sum, T z) {
  return z == T(0) ? T(0) : sum / z;
}

// `moments`: the three sums of that name are there, and u_dot_grad and grad_temperature are wanted.
template <typename T>
SORTKD_HD RowTerms<T> row_terms(const RowSums<T>& sums, const RowLogs<T>& logs, T temperature, bool decoupled, T alpha, T beta,
                                bool with_ce, bool moments) {
  RowTerms<T> terms{};
  const T infinity = std::numeric_limits<T>::infinity();
  if (sums.v_label_student == infinity || sums.v_label_teacher == infinity) {
    // +inf at the label: the softmax of the row is inf / inf.
    terms.kd = terms.ce = terms.on_student = terms.on_teacher = terms.at_label = terms.on_ce = terms.ce_at_label =
        terms.u_dot_grad = terms.grad_temperature = std::numeric_limits<T>::quiet_NaN();
    return terms;
  }
  const T log_z_s = logs.log_z_student, log_z_t = logs.log_z_teacher;
  const Binary<T>&q = logs.q, &p = logs.p;
  // A teacher that leaves nothing beside the label leaves nothing to match there; a student that has nothing there can match
  // no teacher that has.
  const bool teacher_alone = sums.z_teacher == T(0), student_alone = sums.z_student == T(0);
  const bool alone = teacher_alone || student_alone;

  const T tckd = expected(p.label, p.log_label - q.log_label) + expected(p.others, p.log_others - q.log_others);
  const T nckd = teacher_alone ? T(0) : student_alone ? infinity : sums.cross / sums.z_teacher - log_z_t + log_z_s;
  const T a = decoupled ? alpha : T(1);
  const T b = teacher_alone ? T(0) : decoupled ? beta : p.others;
  const T f = weighted(a, tckd) + weighted(b, nckd);
  terms.kd = temperature * temperature * f;

  const T pull = a * (q.label - p.label);  // dF / d odds_s
  terms.on_student = mean_of(decoupled ? b - pull : q.others, sums.z_student);
  terms.on_teacher = mean_of(b, sums.z_teacher);
  terms.at_label = pull;

  if (with_ce) {
    terms.ce = -logs.ce.log_label;
    terms.on_ce = mean_of(logs.ce.others, sums.z_ce);
    terms.ce_at_label = -logs.ce.others;
  }
  if (moments) {
    const T mean_s = mean_of(sums.moment_student, sums.z_student);
    const T mean_t = alone ? T(0) : sums.moment_teacher / sums.z_teacher;
    const T cross = alone ? T(0) : sums.cross / sums.z_teacher;
    const T mean_s_under_t = mean_t - cross;
    const T covariance = alone ? T(0) : sums.moment_cross / sums.z_teacher - mean_t * cross;
    terms.u_dot_grad = b * (mean_s - mean_s_under_t) + expected(pull, sums.v_label_student - mean_s);
    const T dodds_t = expected(p.label * p.others, sums.v_label_teacher - mean_t);
    // 0: one side of the label's odds is impossible for the teacher at any temperature, and the odds are infinite.
    const T odds_gap = (sums.v_label_teacher - log_z_t) - (sums.v_label_student - log_z_s);
    T v_dot_grad = b * covariance + expected(dodds_t, a * odds_gap);
    if (!decoupled) v_dot_grad -= expected(dodds_t, nckd);  // beta = 1 - p_y depends on the teacher too
    terms.grad_temperature = T(2) * temperature * f - temperature * (terms.u_dot_grad + v_dot_grad);
  }
  return terms;
}

// What an absent class of a top-k teacher holds: nothing; or, the k values being log-probabilities of sum `mass`, an equal
// share of what they leave. Rounding may leave a hair above 1: then nothing is left. A NaN stays one.
template <typename T>
SORTKD_HD T tail_logit(bool uniform, double mass, int64_t absent) {
  if (!uniform || absent == 0 || mass >= 1) return -std::numeric_limits<T>::infinity();
  return static_cast<T>(std::log((1 - mass) / static_cast<double>(absent)));
}

// The classes of a top-k teacher, as they were given: int64 or int32.
struct ClassIndices {
  const void* at;
  bool int64;
  SORTKD_HD int64_t operator[](int64_t i) const {
    return int64 ? static_cast<const int64_t*>(at)[i] : static_cast<const int32_t*>(at)[i];
  }
  SORTKD_HD ClassIndices from(int64_t i) const { return {static_cast<const char*>(at) + i * (int64 ? 8 : 4), int64}; }
};

// The bits of a floating-point number, of so many, as an unsigned one that is smaller where that is larger; and back.
template <typename Word, int kBits = 8 * sizeof(Word)>
SORTKD_HD Word descending_bits(Word bits) {
  constexpr Word kSign = Word(1) << (kBits - 1);
  return bits & kSign ? bits : ~bits & (kSign - 1);
}
template <typename T>
SORTKD_HD auto descending_key(T x) {
  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> bits;
  x += T(0);  // -0 and +0 are equal
  memcpy(&bits, &x, sizeof bits);
  return descending_bits(bits);
}

template <typename T>
struct MeanStd {
  T mean, std;
};

// grad_i = on_student exp(v_s) - on_teacher exp(v_t) + on_ce exp(v_ce) - dstd (x_i - mean) for i != y, and at_label for y.
template <typename T>
struct Coefficients {
  T on_student, on_teacher, on_ce, at_label;
  T dstd;  // the way through the student's standard deviation, 0 without one
};

// From the terms, whose sums have v = inverse * x + const with a constant standard deviation, to d loss / d s.
//
// grad_output: what multiplies the row's loss. LSKD's z-score z = (x - mean) / (std + eps) has
// dz_i / dx_j = ([i = j] - 1 / C) / (std + eps) - z_i z_j / ((C - 1) std), and the gradient by z sums to 0.
template <typename T>
SORTKD_HD Coefficients<T> gradient_coefficients(const RowTerms<T>& terms, const LossConfig& config, T grad_output,
                                                T temperature, T inverse, T C, T label_logit, const MeanStd<T>& student) {
  const T kd_scale = grad_output * T(config.kd_weight) * temperature * temperature * inverse;
  const T ce_scale = grad_output * T(config.ce_weight);
  Coefficients<T> c{};
  c.on_student = kd_scale * terms.on_student;
  c.on_teacher = kd_scale * terms.on_teacher;
  c.on_ce = ce_scale * terms.on_ce;
  c.at_label = kd_scale * terms.at_label + ce_scale * terms.ce_at_label;
  if (config.standardize && student.std > T(0)) {
    c.dstd = kd_scale * terms.u_dot_grad / (inverse * (C - T(1)) * student.std * (student.std + T(kStandardizeEps)));
    c.at_label -= c.dstd * (label_logit - student.mean);
  }
  return c;
}

}  // namespace sortkd
