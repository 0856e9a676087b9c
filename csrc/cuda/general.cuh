// The general mode: z-scores, a temperature in a tensor, the temperature's gradient.
#pragma once

#include "kd_terms.cuh"

namespace sortkd {
namespace cuda {

// The moments nearly cancel: their sums over more than a few terms are in double, as what is made of them.
template <typename S>
using GeneralSums = Sums<S, kGeneralSums>;

// Whether the moments are large numbers of which little is left: a mean of the exponents lies so many bits above what they are
// relative to, as no mean does above the largest. Of 400 rows of 40 classes, whose logits deviate by 4, the gradient by the
// temperature is off by up to 3 roundings of its terms' sizes then, as where every row takes its moments about its means, and
// by 12 where none does (test_precision.py).
constexpr double kFarMean = 4;
SORTKD_DEVICE bool is_far(const GeneralSums<double>& sums) {
  return sums.of[kMomentStudent] > kFarMean * sums.of[kZStudent] || sums.of[kMomentTeacher] > kFarMean * sums.of[kZTeacher];
}

// What a row's logits are divided by: the temperature and, of z-scores, the deviations, which the exponents' scales have,
// and the student's `inverse`.
template <typename T>
struct GeneralRow {
  GeneralExponent<T> of_student, of_teacher;
  T temperature, inverse;
  MeanStd<T> student;
  T ce_reference;
};

// Of n logits whose squared distances from their mean have this sum: 0 of equal ones, or NaN for a row with one.
template <typename T>
SORTKD_DEVICE T deviation(T squares, T n) {
  return n > T(1) && squares > T(0) ? sqrt(squares / (n - T(1))) : squares - squares;
}

// In double: of the temperature's gradient little is left of large terms. The labels' exponents are of two.
template <typename T>
SORTKD_DEVICE RowTerms<double> double_terms(const Params<T>& p, const GeneralSums<double>& sums, double student_label,
                                            double teacher_label, double ce_label, double temperature) {
  RowSums<double> r{};
  r.z_student = sums.of[kZStudent], r.z_teacher = sums.of[kZTeacher], r.cross = sums.of[kCross] * kLn2;
  r.v_label_student = student_label * kLn2, r.v_label_teacher = teacher_label * kLn2;
  r.z_ce = sums.of[kZCe], r.v_label_ce = ce_label;
  r.moment_student = sums.of[kMomentStudent] * kLn2, r.moment_teacher = sums.of[kMomentTeacher] * kLn2;
  r.moment_cross = sums.of[kMomentCross] * (kLn2 * kLn2);
  return row_terms(r, row_logs(r, p.with_ce), temperature, p.decoupled, double(p.alpha), double(p.beta), p.with_ce, p.moments);
}

// A row's losses, and the numbers of its gradient.
template <typename T>
struct GeneralTerms {
  T kd, ce;
  Coefficients<T> on;
};

template <typename T>
SORTKD_DEVICE GeneralTerms<T> general_terms(const Params<T>& p, const GeneralSums<double>& sums, const GeneralRow<T>& row,
                                            T student_label, T teacher_label, T weight) {
  const T u_label = row.of_student(student_label), v_label = row.of_teacher(teacher_label);
  if constexpr (std::is_same_v<T, double>) {
    const auto terms = double_terms(p, sums, u_label, v_label, student_label - row.ce_reference, row.temperature);
    return {terms.kd, terms.ce,
            gradient_coefficients(terms, p.config, weight, row.temperature, row.inverse, T(p.C), student_label, row.student)};
  } else {
    const auto sum = [&](int i) { return static_cast<float>(sums.of[i]); };
    KdTerms terms =
        kd_terms(p, {sum(kZStudent), sum(kZTeacher), sum(kCross), 0, u_label, v_label}, weight, row.temperature, row.inverse);
    Coefficients<float> on{};
    const MeanStd<float>& student = row.student;
    if (p.config.standardize && student.std > 0.0f) {  // as gradient_coefficients
      // Relative to a mean: the gradients sum to 0 but for roundings, and what exponents are relative to may be far.
      const float mean_s = mean_of(sum(kMomentStudent), sum(kZStudent));
      const float mean_t = mean_of(static_cast<float>(sums.of[kMomentTeacher] - sums.of[kCross]), sum(kZTeacher));
      const float u_dot_grad =
          terms.on_teacher * sum(kZTeacher) * (mean_s - mean_t) + expected(terms.at_label, u_label - mean_s);
      on.dstd = u_dot_grad * static_cast<float>(kLn2) /
                (row.inverse * static_cast<float>(p.C - 1) * student.std * (student.std + static_cast<float>(kStandardizeEps)));
    }
    if (p.with_ce) {
      constexpr float kBits = static_cast<float>(kLog2e);
      const float u = student_label - row.ce_reference, shift = u > -1.0f ? u : 0.0f, rest = (u - shift) * kBits;
      add_ce(terms, rest, power_of_two(rest), power_of_two(-shift * kBits), sum(kZCe), weight * p.ce_weight);
    }
    on.on_student = terms.on_student, on.on_teacher = terms.on_teacher, on.on_ce = terms.on_ce;
    on.at_label = terms.at_label - (on.dstd == 0.0f ? 0.0f : on.dstd * (student_label - student.mean));
    return {terms.kd, terms.ce, on};
  }
}

// The temperature's gradient of a row, of what general_terms is given.
template <typename T>
SORTKD_DEVICE T temperature_gradient(const Params<T>& p, const GeneralSums<double>& sums, T u_label, T v_label, T temperature,
                                     T weight) {
  return weight * p.kd_weight * T(double_terms(p, sums, u_label, v_label, 0, temperature).grad_temperature);
}

// Of what a warp has of a row, or all of its lanes: how many classes, and of either side their mean, relative to the
// label's logit, and the squares of their distances from it.
struct WarpMoments {
  float count, mean_s, squares_s, mean_t, squares_t;
};

// The same of a block's row, in every thread.
template <typename G>
SORTKD_DEVICE WarpMoments over_row(const WarpMoments& of_warp, G& group, int C) {
  const WarpMoments* const warps = group.exchanged(of_warp);
  const auto merged = [&](auto&& of) {
    Sums<float, 2> sums{};
#pragma unroll 1
    for (int i = static_cast<int>(lane_id()); i < group.row_warps(); i += 32) sums.merge(of(warps[i]));
    return warp_merged(sums);
  };
  const float n = static_cast<float>(C);
  const auto means =
      merged([&](const WarpMoments& w) -> Sums<float, 2> { return {w.count * w.mean_s / n, w.count * w.mean_t / n}; });
  const auto squares = merged([&](const WarpMoments& w) -> Sums<float, 2> {
    const float s = w.mean_s - means.of[0], t = w.mean_t - means.of[1];
    return {w.squares_s + w.count * (s * s), w.squares_t + w.count * (t * t)};
  });
  return {n, means.of[0], squares.of[0], means.of[1], squares.of[1]};
}

// A row that is held, at a temperature, of z-scores with these moments.
SORTKD_DEVICE GeneralRow<float> general_row(const Params<float>& p, float temperature, float student_label, float teacher_label,
                                            const WarpMoments& moments) {
  constexpr float kBits = static_cast<float>(kLog2e), kEps = static_cast<float>(kStandardizeEps);
  const float inverse = 1 / temperature;
  GeneralRow<float> row{
      {inverse * kBits, student_label}, {inverse * kBits, teacher_label}, temperature, inverse, {}, student_label};
  if (p.config.standardize) {
    const float n = static_cast<float>(p.C), mean_t = teacher_label + moments.mean_t;
    row.student = {student_label + moments.mean_s, deviation(moments.squares_s, n)};
    row.inverse /= row.student.std + kEps;
    row.of_student.scale = row.inverse * kBits;
    row.of_teacher.scale = inverse / (deviation(moments.squares_t, n) + kEps) * kBits;
    // Near what the moments are taken about, and never above the largest.
    if (fabsf(row.student.mean) < kInfinity<float>) row.of_student.reference = row.student.mean;
    if (fabsf(mean_t) < kInfinity<float>) row.of_teacher.reference = mean_t;
  }
  return row;
}

// The exponent of the cross-entropy, from the student's.
struct CeExponent {
  float power, offset;
  SORTKD_DEVICE explicit CeExponent(const GeneralRow<float>& row)
      : power(static_cast<float>(kLog2e) / row.of_student.scale),
        offset((row.of_student.reference - row.ce_reference) * static_cast<float>(kLog2e)) {}
  SORTKD_DEVICE float operator()(float u) const { return fmaf(u, power, offset); }
};

// Rows whose temperature's gradient a warp leaves until they are as many as its lanes, of which each takes one: in double
// one is as much work as all else of a row.
class PendingRows {
  struct Row {
    GeneralSums<double> sums;
    float u_label, v_label, temperature, weight;
    int row;  // -1: none
  };
  static_assert(sizeof(Row) == kPendingBytes);
  const Params<float>& p;
  Row* const rows;  // of the warp
  int count = 0;

 public:
  SORTKD_DEVICE PendingRows(const Params<float>& p, int warp)
      : p(p), rows(reinterpret_cast<Row*>(shared_memory() + p.pending) + warp * static_cast<int>(kWarp)) {}
  // By the lanes of a warp that has rows of so many lanes; `row` -1 where it does not count.
  SORTKD_DEVICE void put(int lanes, int row, const GeneralSums<double>& sums, const GeneralRow<float>& of, float student_label,
                         float teacher_label, float weight) {
    const int lane = static_cast<int>(lane_id());
    if (lane % lanes == 0)
      rows[count + lane / lanes] = {sums, of.of_student(student_label), of.of_teacher(teacher_label), of.temperature, weight,
                                    row};
    count += static_cast<int>(kWarp) / lanes;
  }
  // `last`: there will be no more.
  SORTKD_DEVICE void take(bool last) {
    if (count == 0 || (count < static_cast<int>(kWarp) && !last)) return;
    __syncwarp();
    const Row row = rows[lane_id()];
    if (static_cast<int>(lane_id()) < count && row.row >= 0)
      p.grad_temperature[row.row] = temperature_gradient(p, row.sums, row.u_label, row.v_label, row.temperature, row.weight);
    count = 0;
    __syncwarp();
  }
};

}  // namespace cuda
}  // namespace sortkd
