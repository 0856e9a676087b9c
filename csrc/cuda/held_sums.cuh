// The sums of a row that its threads hold: over the classes in registers, over its list, and where they leave their range, over
// the row in memory.
#pragma once

#include "held_stage.cuh"
#include "near_list.cuh"

namespace sortkd {
namespace cuda {

// What is put together of a row's classes, or of those on its list.
template <int n>
struct Part {
  Sums<float, n> sums{};
  float student = -kInfinity<float>, teacher = -kInfinity<float>;  // the largest logits; of a list as add_list says
  SORTKD_DEVICE void merge(const Part& other) {
    sums.merge(other.sums);
    student = fmaxf(student, other.student), teacher = fmaxf(teacher, other.teacher);
  }
  SORTKD_DEVICE Part shuffled_xor(int offset) const {
    return {sums.shuffled_xor(offset), __shfl_xor_sync(kFullMask, student, offset),
            __shfl_xor_sync(kFullMask, teacher, offset)};
  }
  static SORTKD_DEVICE Part none() { return {}; }
};

template <typename X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
struct HeldSums : HeldStage<X, kKind, kHeld, kLogLanes, kMode> {
  using Base = HeldStage<X, kKind, kHeld, kLogLanes, kMode>;
  using Base::p, Base::group, Base::stage, Base::staged, Base::log_lanes;
  using Base::W, Base::kValues, Base::kTeacher, Base::kLowest, Base::kBlank, Base::kGeneral;
  using typename Base::V;

  static constexpr bool kAny = kMode == Mode::KdCeAny, kCe = kMode != Mode::Kd;
  static constexpr int kSums = kGeneral ? kGeneralSums : kCe ? 4 : 3;
  using ThreadSums = Sums<float, kSums>;
  using RowSums = Sums<std::conditional_t<kGeneral, double, float>, kSums>;
  // An exponent whose power is 0, and times which 0 is 0.
  static constexpr float kLeast = std::numeric_limits<float>::lowest();

  // What a row's logits are turned into, by both sides' scales and references.
  struct KdRow {
    Exponent<float, kMode> of_student, of_teacher;
  };
  using Scaled = std::conditional_t<kGeneral, GeneralRow<float>, KdRow>;

  // What is left of a row's logits.
  struct Pass {
    V access;
    float s[kValues], t[kValues];  // their exponentials; at any temperature and in general, of the student the exponents
    ThreadSums sums;               // of this thread
    float student_label, teacher_label;
    Scaled scaled;
    int y;                 // the label; -1: the row does not count
    bool has_label;        // its class is the thread's
    unsigned higher;       // a bit for each class that is put on the list
    int listed = 0;        // entries of the list, of the row of lanes or the block's warp
    bool near = false;     // one of the rows of lanes that take their steps together has a list, or the block's warp
    bool rotated = false;  // or all of them have their corrected logits where the next row's will lie
  };

  // What is known of a row by all of its threads.
  struct Whole {
    RowSums sums;
    Scaled scaled;
    float top;             // the label's corrected logit
    int listed;            // classes above the label; of a block with too many for its list, with kTooMany
    bool near, slow, far;  // a row with a list; one that leaves the range of its sums; is_far
  };

  NearList<kKind> near;
  const bool fourth;  // whether e^4 is the exponential of the cross-entropy

  SORTKD_DEVICE HeldSums(const Params<float>& p, Group<kKind>& group)
      : Base(p, group), near(p.list, group), fourth(p.power == 4) {}

  // Where p is 0 a class counts 0, whatever q. kAll: with the moment that the temperature's gradient alone needs.
  template <bool kAll = true>
  static SORTKD_DEVICE void add_cross(ThreadSums& sums, float u, float v, float e_t) {
    if (e_t == 0.0f) return;
    sums.of[kCross] = fmaf(e_t, v - u, sums.of[kCross]);
    if constexpr (kGeneral) {
      sums.of[kMomentTeacher] = fmaf(e_t, v, sums.of[kMomentTeacher]);
      if constexpr (kAll) sums.of[kMomentCross] = fmaf(e_t, v * (v - u), sums.of[kMomentCross]);
    }
  }
  template <bool kFinite, bool kAll = true>
  SORTKD_DEVICE void add(ThreadSums& sums, float u, float v, float e, float e_t) const {
    sums.of[kZStudent] += e;
    sums.of[kZTeacher] += e_t;
    if constexpr (kFinite)
      sums.of[kCross] = fmaf(e_t, v - u, sums.of[kCross]);
    else
      add_cross<kAll>(sums, u, v, e_t);
    // e^4 or e^2, with no branch; e itself has been added.
    if constexpr (kGeneral)
      sums.of[kMomentStudent] = fmaf(e, fmaxf(u, kLeast), sums.of[kMomentStudent]);
    else if constexpr (kAny)
      sums.of[kZCe] += power_of_two(p.power * u);
    else if constexpr (kCe)
      sums.of[kZCe] = fmaf(e * e, fourth ? e * e : 1.0f, sums.of[kZCe]);
  }
  // Of the general mode: the sums over what a thread holds, both sides' exponents. Leaves the teacher's exponentials, and the
  // student's exponents finite.
  template <bool kAll>
  SORTKD_DEVICE void add_held(ThreadSums& sums, Pass& pass, const Scaled& scaled) const {
#pragma unroll
    for (int n = 0; n < kValues; ++n) {
      const float u = pass.s[n], v = pass.t[n];
      pass.s[n] = fmaxf(u, kLeast), pass.t[n] = power_of_two(v);
      add<false, kAll>(sums, u, v, power_of_two(u), pass.t[n]);
    }
    if (!p.with_ce) return;
    const CeExponent exponent(scaled);
#pragma unroll
    for (int n = 0; n < kValues; ++n) sums.of[kZCe] += power_of_two(exponent(pass.s[n]));
  }

  // What a class above the label is above.
  SORTKD_DEVICE float threshold_of(const Pass& pass) const { return pass.teacher_label + p.over_label; }

  // Room for a float of each class of a row of lanes: the student's logits have it until they are loaded, if they have as many
  // bytes; else it is behind both.
  SORTKD_DEVICE float* values_of_row() const {
    uint4* const of_warp = stage - lane_id() + (sizeof(X) < sizeof(float) ? 2 * kTeacher : 0);
    return reinterpret_cast<float*>(of_warp) + (static_cast<int>(lane_id()) & -group.size) * kValues;
  }
  // The teacher's logit, corrected if it is to be added with the others.
  SORTKD_DEVICE float teacher_of(const Pass& pass, int c) const {
    if (kKind != Kind::Lanes || !pass.rotated) return pass.access.teacher(c);
    const int place = c + pass.access.head, g = place / W;
    return widened(staged(g >> log_lanes(), place % W, (g & (group.size - 1)) - group.member)[kTeacher * W]);
  }

  // What the list's classes have in the sums, and their largest corrected logit, by so many threads of which this is one.
  // `corrects`: first gives them these logits; and in `student` the largest that there was.
  SORTKD_DEVICE void add_list(Part<kSums>& part, const Pass& pass, const Whole& whole, int member, int size,
                              bool corrects = false) const {
#pragma unroll 1
    for (int at = member; at < whole.listed; at += size) {
      if (corrects && near.correct(at, whole.listed, p.config.correction, pass.teacher_label) == 0)
        part.student = near[at].entry.value();
      const float t = near[at].teacher, v = whole.scaled.of_teacher(t), e_t = power_of_two(v);
      part.teacher = fmaxf(part.teacher, t);
      part.sums.of[kZTeacher] += e_t;
      add_cross(part.sums, whole.scaled.of_student(near[at].student), v, e_t);
    }
  }
  // Joins what a row's list has to what is known of the row.
  SORTKD_DEVICE void join_list(const Pass& pass, Whole& whole, const Part<kSums>& part) const {
    if (p.config.correction != Correction::None) whole.top = part.student;
    // What is on the list is the largest there is of the teacher.
    const float v = whole.scaled.of_teacher(part.teacher);
    whole.slow = pass.y >= 0 && !(v < log2_of(kMostOfKd * static_cast<float>(p.C)) &&
                                  scaled(pass, whole, v > -80 ? 1.0f : sum(whole, kZTeacher)));
    whole.sums.merge(converted(part.sums));
  }

  // Whether the sums keep their range, z_t of the teacher.
  SORTKD_DEVICE bool scaled(const Pass& pass, const Whole& whole, float z_t) const {
    const float most = kMostOfKd * static_cast<float>(p.C), most_ce = kMostOfCe * static_cast<float>(p.C);
    const float label = fmaxf(fabsf(pass.student_label), fabsf(pass.teacher_label));
    const bool is_small = label < -kBlank / 2;  // no infinite one is; a NaN is in the sums
    return is_small & well_scaled(sum(whole, kZStudent), most) & well_scaled(z_t, most) &
           (!kCe || (kGeneral && !p.with_ce) || well_scaled(z_ce(whole), most_ce));
  }
  static SORTKD_DEVICE float sum(const Whole& whole, int i) { return static_cast<float>(whole.sums.of[i]); }
  static SORTKD_DEVICE float z_ce(const Whole& whole) { return sum(whole, kCe ? kZCe : kZStudent); }
  static SORTKD_DEVICE RowSums converted(const ThreadSums& some) {
    RowSums sums;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums.of[i] = some.of[i];
    return sums;
  }

  // The row's classes one at a time, from memory, but the label; and those on its list.
  SORTKD_DEVICE void add_classes(Part<kSums>& part, const Pass& pass, const Whole& whole) const {
#pragma unroll 1
    for (int c = group.member; c < p.C; c += group.size) {
      if (c == pass.y) continue;
      const float a = pass.access.student(c), b = teacher_of(pass, c);
      const bool high = !pass.rotated && b > threshold_of(pass);
      const float u = whole.scaled.of_student(a), v = whole.scaled.of_teacher(b);
      part.student = fmaxf(part.student, a), part.teacher = fmaxf(part.teacher, high ? kLowest : b);
      add<false>(part.sums, u, v, power_of_two(u), high ? 0.0f : power_of_two(v));
      if constexpr (kGeneral)
        if (p.with_ce) part.sums.of[kZCe] += power_of_two(CeExponent(whole.scaled)(u));
    }
    if (whole.near) add_list(part, pass, whole, group.member, group.size);
  }

  // Of the general mode: the sums of rows that are far again, relative to the means.
  SORTKD_DEVICE void recentre(Pass& pass, Whole& whole) {
    if constexpr (kGeneral) {
      const auto move = [](Exponent<float, kMode>& of, double moment, double z) {
        const float old = of.reference, next = old + static_cast<float>(moment / z) / of.scale;
        if (fabsf(next) < kInfinity<float>) of.reference = next;
        return (of.reference - old) * of.scale;
      };
      Part<kSums> part;
      if (whole.far) {
        const float by_s = move(whole.scaled.of_student, whole.sums.of[kMomentStudent], whole.sums.of[kZStudent]);
        const float by_t = move(whole.scaled.of_teacher, whole.sums.of[kMomentTeacher], whole.sums.of[kZTeacher]);
#pragma unroll
        for (int n = 0; n < kValues; ++n) {
          pass.s[n] = pass.s[n] == kLeast ? kLowest : pass.s[n] - by_s;
          pass.t[n] = log2_of(pass.t[n]) - by_t;
        }
        add_held<true>(part.sums, pass, whole.scaled);
        if (whole.near) add_list(part, pass, whole, group.member, group.size);
      }
      const RowSums sums = group.merged(converted(part.sums));
      if (whole.far) whole.sums = sums;
    }
  }

  // The sums of rows that leave their range again, relative to the maxima. The rows of a warp take the steps together.
  SORTKD_DEVICE void sum_again(const Pass& pass, Whole& whole) {
#pragma unroll 1
    for (int pass_over = 0; pass_over < 2; ++pass_over) {
      Part<kSums> part;
      if (whole.slow) add_classes(part, pass, whole);
      part = group.merged(part);
      if (!whole.slow) continue;
      whole.sums = converted(part.sums);
      if (pass_over == 1) continue;
      const float largest = reference_of(part.student, pass.student_label);
      whole.scaled.of_student.relative_to(largest);
      whole.scaled.of_teacher.relative_to(reference_of(part.teacher, pass.teacher_label));
      if constexpr (kGeneral) whole.scaled.ce_reference = largest;
    }
  }
};

}  // namespace cuda
}  // namespace sortkd
