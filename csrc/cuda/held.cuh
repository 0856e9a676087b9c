// Rows that their threads hold: KD, and KD with the cross-entropy at temperatures 1, 2 and 4. A logit is read once and
// takes one exponential.
//
// A thread's vectors come through shared memory, which no other thread needs: while a row is computed, the next one is
// on its way there. In shared memory a class has an index, so what a row must not count is set to -infinity before it
// is loaded into registers: the classes of its neighbours, the label, and the classes above the label, which are put on
// a list; trained teachers have few. The list's classes join the sums with their corrected values, and their gradients,
// as the label's, go over the row's. So the passes over registers are plain KD, and nothing is subtracted from a sum.
//
// Exponentials are relative to the label's own logits, which takes no search for maxima. Where a sum then leaves the
// range of its type the row is read again, class by class, relative to its maxima.
#pragma once

#include "access.cuh"
#include "kd_terms.cuh"
#include "reduce.cuh"

namespace sortkd {
namespace cuda {

struct Maxima {
  float student, teacher;
  SORTKD_DEVICE void merge(const Maxima& other) {
    student = fmaxf(student, other.student), teacher = fmaxf(teacher, other.teacher);
  }
  SORTKD_DEVICE Maxima shuffled_xor(int offset) const {
    return {__shfl_xor_sync(kFullMask, student, offset), __shfl_xor_sync(kFullMask, teacher, offset)};
  }
  static SORTKD_DEVICE Maxima none() { return {-kInfinity<float>, -kInfinity<float>}; }
};

// kLogLanes: of the lanes of a row, -1 where the launch says.
template <typename X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
struct HeldRows {
  using V = Vectors<X>;
  static constexpr int W = V::W, kValues = kHeld * W;
  static constexpr bool kCe = kMode == Mode::KdCe;
  static constexpr float kLowest = -kInfinity<float>;
  enum { kZStudent, kZTeacher, kCross, kZCe, kHigher = kCe ? 4 : 3 };
  using RowSums = Sums<float, kHigher + (kKind == Kind::Block)>;
  // From a vector of a thread to its next one, and from the student's to the teacher's.
  static constexpr int kNext = kWarp, kTeacher = kHeld * kWarp;

  // What is left of a row's logits.
  struct Pass {
    float s[kValues], t[kValues];  // their exponentials
    RowSums sums;                  // of this thread
    float student_label, teacher_label, threshold;
    float offset_s, offset_t;  // of the exponents
    int y;                     // the label; -1: the row does not count
    bool has_label;            // its class is the thread's
    unsigned higher;           // a bit for each class that is put on the list
    int shares = 0;            // with a list that lies where the next row's logits would
  };

  const Params<float>& p;
  Group<kKind>& group;
  List<float, kKind, false> list;
  uint4* const stage;
  const int rows;
  const float scale, fourth;  // fourth: whether e^4 is the exponential of the cross-entropy
  int count;                  // rows that count in a mean; -1: not known yet

  SORTKD_DEVICE HeldRows(const Params<float>& p, Group<kKind>& group)
      : p(p),
        group(group),
        list(p.list, group),
        stage(compiler_barrier(reinterpret_cast<uint4*>(shared_memory() + p.stage) + first_vector())),
        rows(static_cast<int>(p.rows)),
        scale(p.inverse_temperature * static_cast<float>(kLog2e)),
        fourth(p.power == 4 ? 1.0f : 0.0f),
        count(-1) {}

  SORTKD_DEVICE int log_lanes() const { return kLogLanes >= 0 ? kLogLanes : p.log_lanes; }
  static SORTKD_DEVICE int first_vector() {
    return static_cast<int>(threadIdx.x / kWarp) * (stage_bytes(kKind, kHeld, W) / 16) + static_cast<int>(lane_id());
  }

  // Starts the row's way to shared memory.
  SORTKD_DEVICE void fetch(int row) const {
    if (row >= rows) return;
    const V access(p, row);
    const uint4* const student = compiler_barrier(access.student4(group.member));
    const uint4* const teacher = compiler_barrier(access.teacher4(group.member));
    const int left = access.count - group.member;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (group.size * j >= left) continue;
      copy_async(stage + kNext * j, student + group.size * j);
      copy_async(stage + kTeacher + kNext * j, teacher + group.size * j);
    }
  }

  // Class i of vector j of the thread that is `lanes` further.
  SORTKD_DEVICE X* staged(int j, int i, int lanes = 0) const { return reinterpret_cast<X*>(stage + lanes + kNext * j) + i; }
  SORTKD_DEVICE void blank(int j, int i) const {
    *staged(j, i) = narrowed<X>(kLowest);
    staged(j, i)[kTeacher * W] = narrowed<X>(kLowest);
  }
  SORTKD_DEVICE int class_of(const V& access, int j, int i) const {
    return (group.member + group.size * j) * W + i - access.head;
  }
  SORTKD_DEVICE float* notes() const { return reinterpret_cast<float*>(shared_memory() + p.list.notes); }

  // Adds a class. Where p is 0 it counts 0, whatever q.
  SORTKD_DEVICE void add(RowSums& sums, float u, float v, float e, float e_t) const {
    sums.of[kZStudent] += e;
    sums.of[kZTeacher] += e_t;
    if (e_t != 0.0f) sums.of[kCross] = fmaf(e_t, v - u, sums.of[kCross]);
    // e^4 or e^2, with no branch; e itself has been added.
    if constexpr (kCe) sums.of[kZCe] = fmaf(e * e, fmaf(e * e, fourth, 1.0f - fourth), sums.of[kZCe]);
  }

  // All rows of the group. A turn is one row's, but for the first and for what follows a list in the memory of the next
  // row's logits: nothing is on its way then, and the turn fetches only.
  SORTKD_DEVICE void run(int row, int step) {
    int ahead = 0;
    int64_t label = p.config.ignore_index;
#pragma unroll 1
    for (int tile = group.index(); tile < static_cast<int>(p.tiles);) {
      Pass pass;
      if (ahead) take(pass, row, label);
      const int next = ahead ? row + step : row;
      if (!pass.shares) {
        label = next < rows ? p.target[next] : p.config.ignore_index;
        fetch(next);
      }
      if (ahead) {
        finish(pass, row);
        tile += p.groups, row += step;
      } else if (p.mean && count < 0) {
        count = counted_rows(p);
      }
      ahead = !pass.shares;
    }
  }

  // The pass that takes the exponentials and their sums.
  SORTKD_DEVICE void take(Pass& pass, int row, int64_t label) const {
    const bool counts = label != p.config.ignore_index;
    assert((!counts || (label >= 0 && label < p.C)) && "a label is outside [0, C)");
    const V access(p, row < rows ? row : 0);
    const int y = counts ? static_cast<int>(label) : 0;
    const unsigned place = static_cast<unsigned>(y + access.head);
    const int label_vector = static_cast<int>(place / W), label_i = static_cast<int>(place % W);
    int label_j = kKind == Kind::Lanes ? label_vector >> log_lanes() : 0;  // label_vector / group.size
    if constexpr (kKind == Kind::Block)
#pragma unroll 1
      while (label_vector >= group.size * (label_j + 1)) ++label_j;
    pass.y = counts ? y : -1;
    pass.has_label = counts && label_vector - label_j * group.size == group.member;

    copies_wait();
    pass.student_label = pass.teacher_label = 0;
    if constexpr (kKind == Kind::Lanes) {
      __syncwarp();
      if (counts) {
        const X* const at = staged(label_j, label_i, label_vector - label_j * group.size - group.member);
        pass.student_label = widened(*at), pass.teacher_label = widened(at[kTeacher * W]);
      }
      __syncwarp();
    } else if (counts) {
      pass.student_label = access.student(y), pass.teacher_label = access.teacher(y);
    }

    // What is not of the row, nor is another class than the label.
    const int whole = counts ? access.whole() : 0;
#pragma unroll 1
    for (int j = kHeld - 1; j >= 0 && group.member + group.size * j >= whole; --j)
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (!counts || class_of(access, j, i) >= p.C) blank(j, i);
    if (group.member == 0)
#pragma unroll 1
      for (int i = 0; i < access.head; ++i) blank(0, i);
    if (pass.has_label) blank(label_j, label_i);

    uint4 raw_s[kHeld], raw_t[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) raw_s[j] = stage[kNext * j];
    pass.threshold = p.config.correction != Correction::None || p.rank ? pass.teacher_label : kInfinity<float>;
    pass.higher = 0;
    const auto load_teacher = [&] {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) raw_t[j] = stage[kTeacher + kNext * j];
    };
    load_teacher();
    if (largest_of<X, kHeld>(raw_t) > pass.threshold) {
#pragma unroll 1
      for (int n = compiler_barrier(kValues) - 1; n >= 0; --n) {  // a count that is not known is not unrolled
        X* const at = staged(n / W, n % W) + kTeacher * W;
        if (widened(*at) > pass.threshold) {
          pass.higher |= 1u << n;
          *at = narrowed<X>(kLowest);
        }
      }
      load_teacher();
    }

    pass.offset_s = -(pass.student_label * scale), pass.offset_t = -(pass.teacher_label * scale);
    pass.sums = {};
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      float* const s = pass.s + j * W;
      float* const t = pass.t + j * W;
      unpack<X>(raw_s[j], s);
      unpack<X>(raw_t[j], t);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float u = fmaf(s[i], scale, pass.offset_s), v = fmaf(t[i], scale, pass.offset_t);
        s[i] = power_of_two(u), t[i] = power_of_two(v);
        add(pass.sums, u, v, s[i], t[i]);
      }
    }
    if constexpr (kKind == Kind::Block)
      pass.sums.of[kHigher] = pass.higher ? 1.0f : 0.0f;
    else
      pass.shares = __any_sync(kFullMask, pass.higher);
  }

  // The sums put together, the losses, and the gradient.
  SORTKD_DEVICE void finish(Pass& pass, int row) {
    const bool here = row < rows, counts = pass.y >= 0;
    const V access(p, here ? row : 0);
    const float threshold = pass.threshold, student_label = pass.student_label, teacher_label = pass.teacher_label;
    float offset_s = pass.offset_s, offset_t = pass.offset_t;
    RowSums sums{}, part = pass.sums;
    const auto z_ce = [&] { return !kCe || p.power == 1 ? sums.of[kZStudent] : sums.of[kCe ? kZCe : 0]; };
    bool fix = false, slow = false;
    int listed = 0;
    float top = teacher_label, second = teacher_label;
    // A second time with what the list adds, or with all that is relative to the maxima.
#pragma unroll 1
    for (bool again = false;; again = true) {
      part = group.merged(part);
      if (slow) sums = {};
      sums.merge(part);
      if (again) break;
      // The rows of a warp take the steps of the list together.
      fix = kKind == Kind::Block ? sums.of[kHigher] > 0.0f : pass.shares;
      if (fix) {
        list.clear();
#pragma unroll 1
        for (unsigned higher = pass.higher; higher; higher &= higher - 1) {
          const int n = __ffs(static_cast<int>(higher)) - 1, c = class_of(access, n / W, n % W);
          list.append(access.teacher(c), c);
        }
        group.sync();
        listed = list.counted();
      }
      const bool fits = kKind == Kind::Lanes || listed <= p.list.room;
      if (kKind == Kind::Block && p.overflow && group.member == 0) p.overflow[row] = !fits;
      if (!fits) {
        group.sync();
        return;
      }
      if (fix) {
        if (group.keeps_list()) {
          list.put_in_order(listed);
          if (listed > 0) top = list[0].value();
          if (listed > 1) second = list[1].value();
          if (group.blocks() > 1 && static_cast<int>(threadIdx.x) < group.blocks()) {
            float* const there = in_block(notes(), threadIdx.x);
            there[0] = top, there[1] = second;
          }
        }
        if (group.blocks() > 1) {
          group.sync();
          top = notes()[0], second = notes()[1];
        }
      }
      if (p.config.correction == Correction::None) second = top;

      const float C = static_cast<float>(p.C);
      // What is on the list is the largest there is of the teacher.
      float z_t = sums.of[kZTeacher];
      if (listed > 0) z_t = fmaxf(z_t, power_of_two(fmaf(second, scale, offset_t)));
      slow = counts && !(well_scaled(sums.of[kZStudent], C) && well_scaled(z_t, C) && well_scaled(z_ce(), C));
      const bool any_slow = group.any(slow);
      if (!fix && !any_slow) break;
      part = {};
      if (any_slow) {
        const auto each = [&](auto&& f) {
#pragma unroll 1
          for (int c = group.member; slow && c < p.C; c += group.size)
            if (c != pass.y) f(access.student(c), access.teacher(c));
        };
        Maxima maxima = Maxima::none();
        each([&](float a, float b) { maxima.merge({a, b > threshold ? kLowest : b}); });
        maxima = group.merged(maxima);
        if (listed > 0) maxima.teacher = fmaxf(maxima.teacher, second);
        if (slow) {
          offset_s = -(reference_of(maxima.student, student_label) * scale);
          offset_t = -(reference_of(maxima.teacher, teacher_label) * scale);
        }
        each([&](float a, float b) {
          const float u = fmaf(a, scale, offset_s), v = fmaf(b, scale, offset_t);
          add(part, u, v, power_of_two(u), b > threshold ? 0.0f : power_of_two(v));
        });
      }
      if (fix && group.keeps_list())
#pragma unroll 1
        for (int at = group.list_member(); at < listed; at += group.list_size()) {
          const float u = fmaf(access.student(list[at].c()), scale, offset_s);
          const float v = fmaf(list.corrected(at, p.config.correction, listed, teacher_label), scale, offset_t),
                      e_t = power_of_two(v);
          part.of[kZTeacher] += e_t;
          if (e_t != 0.0f) part.of[kCross] = fmaf(e_t, v - u, part.of[kCross]);
        }
    }

    if (p.config.correction == Correction::None) top = teacher_label;
    const KdSums row_sums{
        sums.of[kZStudent],        sums.of[kZTeacher], sums.of[kCross], z_ce(), fmaf(student_label, scale, offset_s),
        fmaf(top, scale, offset_t)};
    float weight = here && p.grad_output ? p.grad_output[row * p.grad_output_stride] : 1.0f;
    if (p.mean) weight *= reciprocal(static_cast<float>(count));
    KdTerms on = kd_terms(p, row_sums, p.temperature_value, weight * p.kd_weight * p.temperature_value, weight * p.ce_weight,
                          kCe ? p.power : 0);
    if (!counts) on = {};
    if (here && group.member == 0) write_row(p, group.slot, row, on.kd, on.ce, listed);
    if (p.grad) {
      // Of the exponential's first, second and fourth power.
      const float first = on.on_student + (p.power == 1 ? on.on_ce : 0.0f), second = p.power == 2 ? on.on_ce : 0.0f;
      const float fourth = p.power == 4 ? on.on_ce : 0.0f;
      const auto gradient = [&](float e, float e_t) {
        const float by = kCe ? fmaf(e, fmaf(e * e, fourth, second), first) : on.on_student;
        return fmaf(e, by, -(e_t * on.on_teacher));
      };
      const auto gradient_of = [&](float a, float b) {
        return gradient(power_of_two(fmaf(a, scale, offset_s)), power_of_two(fmaf(b, scale, offset_t)));
      };
      if (fix) {
        // While the logits are there still: the gradient may lie in their place.
        if (group.keeps_list())
          list.replace_values(listed, [&](int at) {
            return gradient_of(access.student(list[at].c()), list.corrected(at, p.config.correction, listed, teacher_label));
          });
        group.sync();
      }
      const bool by_class = slow || p.scalar_grads;
      const int end = here && !by_class ? access.whole() - group.member : 0;
      uint4* const to = compiler_barrier(access.grad4(group.member));
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        float grads[W];
#pragma unroll
        for (int i = 0; i < W; ++i) grads[i] = gradient(pass.s[j * W + i], pass.t[j * W + i]);
        store_if(group.size * j < end && (j > 0 || group.member >= access.begin()), to + group.size * j, pack<X>(grads));
      }
      if (here)
        put_edges(access, group, p.C, by_class ? p.C : access.before(), by_class ? p.C : access.after(), pass.y,
                  [&](int c) { return counts ? gradient_of(access.student(c), access.teacher(c)) : 0.0f; });
      // By the thread that has written the label's vector, so after it; class by class, by nobody.
      if (pass.has_label) access.put(pass.y, on.at_label);
      if (fix) {
        group.sync();
        if (group.keeps_list())
#pragma unroll 1
          for (int at = group.list_member(); at < listed; at += group.list_size()) access.put(list[at].c(), list[at].number());
      }
    }
    if (fix) group.sync();  // the next row takes this one's list
  }
};

template <class X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
__global__ void __launch_bounds__(kKind == Kind::Lanes ? kSmallBlock : kMostRowBlock, kKind == Kind::Lanes ? 4 : 1)
    sort_kd_held(const __grid_constant__ Params<float> p) {
  const int log_lanes = kLogLanes >= 0 ? kLogLanes : p.log_lanes;
  Group<kKind> group(log_lanes, p.cluster);
  const int slots = kKind == Kind::Lanes ? static_cast<int>(blockDim.x) >> log_lanes : 1;
  if (group.keeps_list()) open_ticket(p);
  if (p.reduced && group.member == 0) totals_of(p, group.slot) = {0, 0};
  if (group.blocks() > 1) cluster_barrier();  // the others' shared memory is there
  HeldRows<X, kKind, kHeld, kLogLanes, kMode> rows(p, group);
  rows.run(group.index() * slots + group.slot, p.groups * slots);
  if (p.reduced && group.keeps_list()) reduce(p, max(rows.count, 0), slots, group.index());
  if (group.blocks() > 1) cluster_barrier();  // others may still look into this block's memory
}

}  // namespace cuda
}  // namespace sortkd
