// The way of a row's vectors to the threads that hold them, through shared memory: which of them a thread has, where they lie
// there, and which classes they are.
#pragma once

#include "access.cuh"
#include "general.cuh"

namespace sortkd {
namespace cuda {

// X: the dtype of both sides. kHeld: vectors of a thread. kLogLanes: of the lanes of a row, -1 where the launch says.
template <typename X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
struct HeldStage {
  using V = Vectors<X>;
  static constexpr int W = V::W, kValues = kHeld * W;
  static constexpr bool kGeneral = kMode == Mode::General;
  static constexpr float kLowest = -kInfinity<float>;
  // What a blank class holds: beside a label that is small its exponentials are 0, and their product with the difference
  // of the exponents is a number. Halves have no such number, and z-scores may make it infinite.
  static constexpr bool kBlankIsFinite = !std::is_same_v<X, Half> && !kGeneral;
  static constexpr float kBlank = kBlankIsFinite ? -0x1p100f : kLowest;
  // Whether the threads that take their steps together have one row, so that there is no row beyond the last.
  static constexpr bool kOneRow = kKind == Kind::Block || kLogLanes == 5;
  // From a vector of a thread to its next one, and from the student's to the teacher's.
  static constexpr int kNext = kWarp, kTeacher = kHeld * kWarp;

  // Of a row that is on its way. A block's threads do not see each other's copies: each loads the label's logits, and
  // for that the label comes a row earlier.
  struct Coming {
    int64_t label;       // of this row, or of a block's next one
    int y;               // of a block's row: its class, kIgnored or kOutside
    X student, teacher;  // at the label
    float temperature;   // of the general mode
  };
  enum { kIgnored = -1, kOutside = -2 };

  const Params<float>& p;
  Group<kKind>& group;
  const int first_vector;  // of the thread
  uint4* const stage;      // for the first one
  const int rows;

  SORTKD_DEVICE HeldStage(const Params<float>& p, Group<kKind>& group)
      : p(p),
        group(group),
        first_vector(kKind == Kind::Lanes ? group.member
                                          : group.member / static_cast<int>(kWarp) * (kHeld * static_cast<int>(kWarp)) +
                                                static_cast<int>(lane_id())),
        stage(compiler_barrier(reinterpret_cast<uint4*>(shared_memory() + p.stage) +
                               threadIdx.x / kWarp * (stage_bytes(kKind, kHeld, W) / 16) + lane_id())),
        rows(static_cast<int>(p.rows)) {}

  SORTKD_DEVICE int log_lanes() const { return kLogLanes >= 0 ? kLogLanes : p.log_lanes; }
  // From a thread's vector of the row to its next one: a block's warps have neighbouring vectors each.
  SORTKD_DEVICE int stride() const { return kKind == Kind::Lanes ? group.size : static_cast<int>(kWarp); }

  SORTKD_DEVICE bool here(int row) const { return kOneRow || row < rows; }
  // Whether one of the rows that take their steps together says so.
  SORTKD_DEVICE bool any(bool says) const { return kOneRow ? says : group.any(says); }

  // Starts the row's way to shared memory.
  SORTKD_DEVICE void fetch(int row, Coming& coming) const {
    if (row >= rows) return;
    const V access(p, row);
    if constexpr (kGeneral)
      coming.temperature = p.temperature ? p.temperature[row * p.temperature_stride] : p.temperature_value;
    if constexpr (kKind == Kind::Block) {
      coming.y = class_of_label(coming.label);
      if (coming.y >= 0) coming.student = *access.student_at(coming.y), coming.teacher = *access.teacher_at(coming.y);
      if (p.step < rows - row) coming.label = p.target[row + p.step];
    } else {
      coming.label = p.target[row];
    }
    const uint4* const student = compiler_barrier(access.student4(first_vector));
    const uint4* const teacher = compiler_barrier(access.teacher4(first_vector));
    const int left = access.count - first_vector;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (stride() * j >= left) continue;
      copy_async(stage + kNext * j, student + stride() * j);
      copy_async(stage + kTeacher + kNext * j, teacher + stride() * j);
    }
  }
  SORTKD_DEVICE int class_of_label(int64_t label) const {
    const int y = label == p.config.ignore_index ? kIgnored : kOutside;
    return static_cast<uint64_t>(label) < static_cast<unsigned>(p.C) && static_cast<int>(label) != p.ignored
               ? static_cast<int>(label)
               : y;
  }

  // Class i of vector j of the thread that is `lanes` further.
  SORTKD_DEVICE X* staged(int j, int i, int lanes = 0) const { return reinterpret_cast<X*>(stage + lanes + kNext * j) + i; }
  SORTKD_DEVICE void blank(int j, int i) const {
    *staged(j, i) = narrowed<X>(kBlank);
    staged(j, i)[kTeacher * W] = narrowed<X>(kBlank);
  }
  SORTKD_DEVICE int class_of(const V& access, int j, int i) const {
    return (first_vector + stride() * j) * W + i - access.head;
  }

  // Of z-scores: what the warp has of the row, by logits relative to the label's.
  SORTKD_DEVICE WarpMoments moments_of_warp(const V& access, float student_label, float teacher_label) const {
    // f(s, t) for the classes that are the thread's, relative to the label.
    float s[kValues], t[kValues];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      unpack<X>(stage[kNext * j], s + j * W);
      unpack<X>(stage[kTeacher + kNext * j], t + j * W);
#pragma unroll
      for (int n = j * W; n < (j + 1) * W; ++n) s[n] -= student_label, t[n] -= teacher_label;
    }
    const auto each = [&](auto&& f) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (!access.inner(first_vector + stride() * j)) continue;
#pragma unroll
        for (int n = j * W; n < (j + 1) * W; ++n) f(s[n], t[n]);
      }
      if (p.aligned) return;
#pragma unroll 1
      for (int j = 0; j < kHeld; ++j) {
        const int g = first_vector + stride() * j;
        if (g >= access.count || access.inner(g)) continue;
#pragma unroll 1
        for (int i = 0; i < W; ++i)
          if (static_cast<unsigned>(class_of(access, j, i)) < static_cast<unsigned>(p.C))
            f(widened(*staged(j, i)) - student_label, widened(staged(j, i)[kTeacher * W]) - teacher_label);
      }
    };
    const auto merged = [&](const Sums<float, 2>& sums) {
      if constexpr (kKind == Kind::Lanes) return group.merged(sums);
      return warp_merged(sums);
    };
    // A block's warps have neighbouring classes each.
    const int begin = kKind == Kind::Block ? (first_vector - static_cast<int>(lane_id())) * W - access.head : 0;
    const int end = kKind == Kind::Block ? begin + kHeld * static_cast<int>(kWarp) * W : p.C;
    const float count = static_cast<float>(max(min(end, p.C) - max(begin, 0), 0));
    Sums<float, 2> sums{};
    each([&](float s, float t) { sums.merge({s, t}); });
    sums = merged(sums);
    const float mean_s = mean_of(sums.of[0], count), mean_t = mean_of(sums.of[1], count);
    Sums<float, 2> squares{};
    each([&](float s, float t) { squares.merge({(s - mean_s) * (s - mean_s), (t - mean_t) * (t - mean_t)}); });
    squares = merged(squares);
    return {count, mean_s, squares.of[0], mean_t, squares.of[1]};
  }
};

}  // namespace cuda
}  // namespace sortkd
