// The scalar formulas of one row, shared by the CPU and CUDA kernels: from the row's sums to its losses and to the few
// numbers that the gradient pass needs. The derivations are in sortkd_kernels/reference.py.
//
// All sums run over the classes without the label, relative to the maxima without the label. The label enters through its
// log odds d = v_y - log z, so 1 - q_y keeps its precision where q_y rounds to 1, and one set of sums serves KD and DKD:
// KD is DKD with alpha = 1 and beta = 1 - p_y.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define SORTKD_HD __host__ __device__ __forceinline__
#else
#define SORTKD_HD inline
#endif

namespace sortkd {

constexpr double kStandardizeEps = 1e-7;

// v = a (x - max), in nats, a the inverse temperature (times the inverse standard deviation under standardization).
template <typename T>
struct RowSums {
  T z_student, z_teacher;     // sum exp v
  T cross;                    // sum exp(v_t) (v_t - v_s)
  T v_label_student, v_label_teacher;
  T z_plain, v_label_plain;   // the student at temperature 1, for the cross-entropy
  T moment_student;           // sum exp(v_s) v_s
  T moment_teacher;           // sum exp(v_t) v_t
  T moment_cross;             // sum exp(v_t) v_t (v_t - v_s)
};

// grad_i = on_student exp(v_s) - on_teacher exp(v_t) + on_plain exp(v_1) for i != y, and `at_label` for y, all to be
// multiplied by what d u / d s is; `along_u` = sum (dF/du) u for the chain through the student's standard deviation.
template <typename T>
struct RowTerms {
  T kd, ce;
  T on_student, on_teacher, at_label;
  T on_plain, plain_at_label;
  T along_u;
  T grad_temperature;
};

// A binary distribution by its log odds, each part at full precision however close to 0 or 1 the other is.
template <typename T>
struct Binary {
  T log_label, log_others;
  T label, others;
};

// Two transcendental calls: a row of a hundred classes takes no longer than its scalars.
template <typename T>
SORTKD_HD Binary<T> from_log_odds(T odds) {
  const T small = std::exp(-std::fabs(odds));  // in [0, 1]
  const T whole = T(1) + small;
  // log1p: the correction undoes the rounding of 1 + small.
  const T rest = whole == T(1) ? small : std::log(whole) * (small / (whole - T(1)));
  const T large = T(1) / whole;
  const bool likely = odds > T(0);
  return {-(likely ? rest : rest - odds), -(likely ? rest + odds : rest), likely ? large : small * large,
          likely ? small * large : large};
}

template <typename T>
SORTKD_HD T entropy_term(T p, T log_p, T log_q) {
  return p == T(0) ? T(0) : p * (log_p - log_q);
}

// Options: anything with decoupled, alpha, beta. `moments`: along_u and grad_temperature are wanted. F below is the loss
// of the row divided by T^2.
template <typename T>
SORTKD_HD RowTerms<T> row_terms(const RowSums<T>& sums, T temperature, bool decoupled, T alpha, T beta, bool with_ce,
                                bool moments) {
  RowTerms<T> terms{};
  const T infinity = std::numeric_limits<T>::infinity();
  if (sums.v_label_student == infinity || sums.v_label_teacher == infinity) {
    // +inf at the label: the softmax of the row is inf / inf.
    terms.kd = terms.ce = terms.on_student = terms.on_teacher = terms.at_label = terms.on_plain = terms.plain_at_label =
        terms.along_u = terms.grad_temperature = std::numeric_limits<T>::quiet_NaN();
    return terms;
  }
  const T log_z_s = std::log(sums.z_student), log_z_t = std::log(sums.z_teacher);
  const T odds_s = sums.v_label_student - log_z_s, odds_t = sums.v_label_teacher - log_z_t;
  const Binary<T> q = from_log_odds(odds_s), p = from_log_odds(odds_t);

  const T tckd = entropy_term(p.label, p.log_label, q.log_label) + entropy_term(p.others, p.log_others, q.log_others);
  // A side with no finite logit beside the label has nothing to renormalise.
  const bool alone = sums.z_teacher == T(0) || sums.z_student == T(0);
  const T nckd = alone ? T(0) : sums.cross / sums.z_teacher - log_z_t + log_z_s;
  const T a = decoupled ? alpha : T(1);
  const T b = decoupled ? beta : p.others;
  const T f = a * tckd + b * nckd;
  terms.kd = temperature * temperature * f;

  const T pull = a * (q.label - p.label);  // dF / d odds_s
  terms.on_student = sums.z_student == T(0) ? T(0) : (decoupled ? b - pull : q.others) / sums.z_student;
  terms.on_teacher = sums.z_teacher == T(0) ? T(0) : b / sums.z_teacher;
  terms.at_label = pull;

  if (with_ce) {
    const T log_z = std::log(sums.z_plain);
    const Binary<T> plain = from_log_odds(sums.v_label_plain - log_z);
    terms.ce = -plain.log_label;
    terms.on_plain = sums.z_plain == T(0) ? T(0) : plain.others / sums.z_plain;
    terms.plain_at_label = -plain.others;
  }
  if (moments) {
    const T mean_s = sums.z_student == T(0) ? T(0) : sums.moment_student / sums.z_student;
    const T mean_t = alone ? T(0) : sums.moment_teacher / sums.z_teacher;
    const T cross = alone ? T(0) : sums.cross / sums.z_teacher;
    const T mean_t_of_s = mean_t - cross;  // E_p^[v_s]
    const T covariance = alone ? T(0) : sums.moment_cross / sums.z_teacher - mean_t * cross;
    terms.along_u = b * (mean_s - mean_t_of_s) + pull * (sums.v_label_student - mean_s);
    const T spread = p.label * p.others * (sums.v_label_teacher - mean_t);
    // spread 0: one side of the label's odds is impossible for the teacher at any temperature, and the odds are infinite.
    T along_v = b * covariance;
    if (spread != T(0)) along_v += a * spread * (odds_t - odds_s);
    if (!decoupled) along_v -= nckd * spread;  // beta = 1 - p_y depends on the teacher too
    terms.grad_temperature = T(2) * temperature * f - temperature * (terms.along_u + along_v);
  }
  return terms;
}

}  // namespace sortkd
