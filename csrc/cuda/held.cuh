// Rows that their threads hold. A logit is read once and takes one exponential; two more, and one in the gradient again,
// the student's beside a cross-entropy at temperatures other than 1, 2 and 4. In the general mode threads hold the student's
// exponents, for what is known only when a pass over the row is done, and take its exponentials in each pass.
//
// A thread's vectors come through shared memory, which no other thread needs: while a row is computed, the next one is
// on its way there. In shared memory a class has an index, so what a row must not count is blanked before it is loaded
// into registers: the classes of its neighbours, the label, and the classes above the label, which are put on a list;
// trained teachers have few. The list's classes join the sums with their corrected values, and their gradients, as the
// label's, go over the row's. So the passes over registers are plain KD, and nothing is subtracted from a sum. Of rows with
// too many for the list, lanes correct the logits before they load them (rotate.cuh); blocks leave them to a launch of their
// own.
//
// Exponentials are relative to the label's own logits, those of z-scores to their means, which takes no search for maxima.
// Where a sum then leaves the range of its type the row is read again, class by class, relative to its maxima.
#pragma once

#include "held_sums.cuh"
#include "reduce.cuh"
#include "rotate.cuh"

namespace sortkd {
namespace cuda {

template <typename X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
struct HeldRows : HeldSums<X, kKind, kHeld, kLogLanes, kMode> {
  using Base = HeldSums<X, kKind, kHeld, kLogLanes, kMode>;
  using Base::fetch, Base::class_of_label, Base::class_of, Base::staged, Base::blank, Base::values_of_row, Base::threshold_of;
  using Base::here, Base::any;
  using Base::kNext, Base::kTeacher, Base::kIgnored, Base::kOutside;
  using Base::kOneRow;
  using Base::p, Base::group, Base::near, Base::first_vector, Base::stage, Base::rows, Base::log_lanes, Base::stride;
  using Base::scaled, Base::moments_of_warp, Base::recentre, Base::sum_again;
  using Base::teacher_of, Base::add_cross, Base::add_list, Base::join_list, Base::sum, Base::z_ce, Base::converted;
  using Base::W, Base::kValues, Base::kSums, Base::kGeneral, Base::kAny, Base::kCe, Base::kBlank, Base::kBlankIsFinite;
  using typename Base::Coming, typename Base::Pass, typename Base::RowSums, typename Base::Scaled, typename Base::V;
  using typename Base::Whole;

  // More classes than there are: what a block's warp adds to its number of those above the label if its list has no room.
  static constexpr int kTooMany = 1 << 20;

  using Terms = std::conditional_t<kGeneral, GeneralTerms<float>, KdTerms>;

  // What the first warp of a block has found out for the others.
  struct alignas(16) Posted {
    Terms on;
    int listed, slow, far;  // as Whole
    float top;
    RowSums sums;
  };
  static_assert(sizeof(Posted) <= kNoteBytes);

  PendingRows pending;  // of the general mode
  const float scale;
  float weight;  // of a row in the result

  SORTKD_DEVICE HeldRows(const Params<float>& p, Group<kKind>& group)
      : Base(p, group),
        pending(p, kKind == Kind::Lanes ? static_cast<int>(threadIdx.x / kWarp) : 0),
        scale(p.inverse_temperature * static_cast<float>(kLog2e)),
        weight(1) {}

  // All rows of the group, each one on its way while the one before is computed; not so where a row's corrected logits lie
  // in its place.
  SORTKD_DEVICE void run(int row) {
    Coming coming{};
    if (kKind == Kind::Block && row < rows) coming.label = p.target[row];
    const Ticket<float> ticket(p);
    RowCount<float> count(p);
    fetch(row, coming);
    ticket.open();
    count.count();
    const int lane_row = kOneRow ? 0 : static_cast<int>(lane_id()) >> log_lanes();
#pragma unroll 1
    for (bool first = true;; first = false) {
      const bool has_row = row - lane_row < rows;
      Pass pass{V(p, here(row) ? row : 0)};
      if (has_row) take(pass, row, coming);
      // Not before a row is there: its gradient is the first that needs the number.
      if (first && p.mean) {
        const int rows_that_count = count.of_all();
        weight = rows_that_count > 0 ? reciprocal(static_cast<float>(rows_that_count)) : 0.0f;
      }
      if (!has_row) break;
      finish(pass, row);
      row += p.step;
      if (pass.rotated) fetch(row, coming);
      if constexpr (kGeneral) pending.take(row - lane_row >= rows);
    }
  }

  // The pass that takes the exponentials and their sums. The next row leaves as soon as this one is in registers: what a
  // thread has begun to read from shared memory it has long before a copy that begins later arrives there.
  SORTKD_DEVICE void take(Pass& pass, int row, Coming& coming) {
    pass.y = kKind == Kind::Block ? coming.y : here(row) ? class_of_label(coming.label) : kIgnored;
    assert(pass.y != kOutside && "a label is outside [0, C)");
    const bool counts = pass.y >= 0;
    const V& access = pass.access;
    const int y = max(pass.y, 0);
    const unsigned place = static_cast<unsigned>(y + access.head);
    const int label_vector = static_cast<int>(place / W), label_i = static_cast<int>(place % W);
    // A block's warp has kHeld vectors of each lane.
    const int label_j = kKind == Kind::Lanes ? label_vector >> log_lanes() : label_vector >> 5 & (kHeld - 1);
    pass.has_label = counts && label_vector - label_j * stride() == first_vector;

    copies_wait();
    if constexpr (kKind == Kind::Lanes) {
      __syncwarp();
      const X* const at = staged(label_j, label_i, label_vector - label_j * stride() - first_vector);
      pass.student_label = widened(*at), pass.teacher_label = widened(at[kTeacher * W]);
      __syncwarp();
    } else {
      pass.student_label = widened(coming.student), pass.teacher_label = widened(coming.teacher);
    }
    if (!counts) pass.student_label = pass.teacher_label = 0;
    // Before the next row's comes; a row that does not count may have anything, also as its logits.
    const float temperature = kGeneral && counts ? coming.temperature : 1.0f;
    WarpMoments moments;
    if constexpr (kGeneral) {
      if (p.config.standardize) moments = moments_of_warp(access, pass.student_label, pass.teacher_label);
      if (!counts) moments = {};
    }

    // What is not of the row, nor is another class than the label.
    const int whole = counts ? access.whole() : 0;
#pragma unroll 1
    for (int j = kHeld - 1; j >= 0 && first_vector + stride() * j >= whole; --j) {
      if (!counts || first_vector + stride() * j >= access.count) {
        float values[W];
#pragma unroll
        for (float& value : values) value = kBlank;
        stage[kNext * j] = stage[kTeacher + kNext * j] = pack<X>(values);
      } else {
#pragma unroll 1
        for (int i = W - 1; class_of(access, j, i) >= p.C; --i) blank(j, i);
      }
    }
    if (group.member == 0)
#pragma unroll 1
      for (int i = 0; i < access.head; ++i) blank(0, i);
    if (pass.has_label) blank(label_j, label_i);

    uint4 raw_s[kHeld], raw_t[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) raw_s[j] = stage[kNext * j];
    const float threshold = threshold_of(pass);
    pass.higher = 0;
    const auto load_teacher = [&] {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) raw_t[j] = stage[kTeacher + kNext * j];
    };
    load_teacher();
    if (largest_of<X, kHeld>(raw_t) > threshold) {
#pragma unroll 1
      for (int j = compiler_barrier(kHeld) - 1; j >= 0; --j) {  // a count that is not known is not unrolled
        float values[W];
        unpack<X>(stage[kTeacher + kNext * j], values);
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < W; ++i) bits |= values[i] > threshold ? 1u << i : 0u;
        pass.higher = pass.higher << W | bits;
      }
      // What is blank is above a label of -infinity.
      if (kBlankIsFinite && threshold < kBlank)
#pragma unroll 1
        for (unsigned left = pass.higher; left; left &= left - 1) {
          const int n = __ffs(static_cast<int>(left)) - 1, c = class_of(access, n / W, n % W);
          if (static_cast<unsigned>(c) >= static_cast<unsigned>(p.C) || c == y) pass.higher ^= 1u << n;
        }
    }
    if (__any_sync(kFullMask, pass.higher)) {
      correct(pass);
      load_teacher();
    }
    if (!pass.rotated) fetch(row + p.step, coming);

    if constexpr (kGeneral) {
      if (kKind == Kind::Block && p.config.standardize) moments = over_row(moments, group, p.C);
      pass.scaled = general_row(p, temperature, pass.student_label, pass.teacher_label, moments);
    } else {
      pass.scaled.of_student.scale = pass.scaled.of_teacher.scale = scale;
      pass.scaled.of_student.relative_to(pass.student_label), pass.scaled.of_teacher.relative_to(pass.teacher_label);
    }
    const auto of_student = pass.scaled.of_student, of_teacher = pass.scaled.of_teacher;
    pass.sums = {};
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      float* const s = pass.s + j * W;
      float* const t = pass.t + j * W;
      unpack<X>(raw_s[j], s);
      unpack<X>(raw_t[j], t);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float u = of_student(s[i]), v = of_teacher(t[i]);
        s[i] = u, t[i] = v;
        if constexpr (kGeneral) continue;
        const float e = power_of_two(u);
        t[i] = power_of_two(v);
        this->template add<kBlankIsFinite>(pass.sums, u, v, e, t[i]);
        if constexpr (!kAny) s[i] = kCe ? compiler_barrier(e) : e;  // its square is not kept
      }
    }
    if constexpr (kGeneral) {
      if (p.grad_temperature)
        this->template add_held<true>(pass.sums, pass, pass.scaled);
      else
        this->template add_held<false>(pass.sums, pass, pass.scaled);
    }
    if (kBlankIsFinite && pass.sums.of[kCross] != pass.sums.of[kCross]) {  // logits of -infinity
      pass.sums.of[kCross] = 0;
#pragma unroll 1
      for (int n = compiler_barrier(kValues) - 1; n >= 0; --n) {
        const int c = class_of(access, n / W, n % W);
        if (static_cast<unsigned>(c) >= static_cast<unsigned>(p.C) || c == y || pass.higher >> n & 1) continue;
        const float v = of_teacher(teacher_of(pass, c));
        add_cross(pass.sums, of_student(access.student(c)), v, power_of_two(v));
      }
    }
  }

  // Blanks the classes above the label, and puts them on the list if it has room for them; of lanes that have more, rotates
  // them.
  SORTKD_DEVICE void correct(Pass& pass) const {
    const int own = __popc(pass.higher), lanes = kKind == Kind::Lanes ? group.size : static_cast<int>(kWarp);
    const int last = warp_prefix(own, lanes);
    pass.listed = __shfl_sync(kFullMask, last, lanes - 1, lanes);
    if constexpr (kKind == Kind::Lanes) {
      pass.rotated = __any_sync(kFullMask, pass.listed > lanes * kNearEntries);
      if (pass.rotated) {
        rotate_top(
            group, p.config.correction, pass.teacher_label, pass.higher, last - own, pass.listed, values_of_row(),
            reinterpret_cast<unsigned short*>(near.entries), [&](int n) -> X& { return staged(n / W, n % W)[kTeacher * W]; },
            [&](int n) { return class_of(pass.access, n / W, n % W); });
        pass.higher = 0;
        return;
      }
    }
    pass.near = kKind == Kind::Lanes || pass.listed <= kNearOfWarp;
    Near* to = near.of_warp + last - own;
#pragma unroll 1
    for (unsigned left = pass.higher; left; left &= left - 1) {
      const int n = __ffs(static_cast<int>(left)) - 1;
      X* const at = staged(n / W, n % W);
      if (pass.near)
        *to++ = {Entry<float>::of(widened(at[kTeacher * W]), class_of(pass.access, n / W, n % W)), widened(*at), 0};
      at[kTeacher * W] = narrowed<X>(kBlank);
    }
  }

  SORTKD_DEVICE bool is_near(int listed) const { return listed > 0 && listed <= p.list.room; }
  // The sums of a block's row, for the threads that lead, and its list, in every block: each warp sends its entries to all of
  // them.
  SORTKD_DEVICE void gather(const Pass& pass, Whole& whole) {
    Sums<int, 2> all_and_before;
    whole.sums = group.merged(converted(pass.sums), pass.listed + (pass.listed > kNearOfWarp ? kTooMany : 0), all_and_before);
    whole.listed = all_and_before.of[0];
    whole.near = is_near(whole.listed);
    if (whole.near) near.gather(pass.listed, all_and_before.of[1], whole.listed);
  }

  // Leaves the row's gradient by the temperature until the warp has more of them.
  SORTKD_DEVICE void put_pending(const Pass& pass, const Whole& whole, int row, float weight) {
    if constexpr (kGeneral) {
      const bool counts = pass.y >= 0;
      if (!counts && here(row) && group.member == 0) p.grad_temperature[row] = 0;
      pending.put(kKind == Kind::Lanes ? group.size : static_cast<int>(kWarp), counts && group.is_first_block() ? row : -1,
                  whole.sums, whole.scaled, pass.student_label, whole.top, weight);
    }
  }

  static SORTKD_DEVICE float at_label(const Terms& terms) {
    if constexpr (kGeneral)
      return terms.on.at_label;
    else
      return terms.at_label;
  }
  // The gradient at a class, from what pass.s and pass.t have of it; kWithCe: in the general mode, where there may be a
  // cross-entropy.
  template <bool kWithCe = true>
  SORTKD_DEVICE auto gradient_by(const Scaled& scaled, const Terms& terms) const {
    if constexpr (kGeneral) {
      const Coefficients<float>& on = terms.on;
      const CeExponent exponent(scaled);
      const float about = on.dstd == 0.0f ? 0.0f : -on.dstd * (scaled.of_student.reference - scaled.student.mean);
      const float by_u = on.dstd == 0.0f ? 0.0f : -on.dstd / scaled.of_student.scale;
      return [=, &p = p](float u, float e_t) {
        float g = fmaf(power_of_two(u), on.on_student, fmaf(e_t, -on.on_teacher, about));
        if (kWithCe && p.with_ce) g = fmaf(power_of_two(exponent(u)), on.on_ce, g);
        return fmaf(u, by_u, g);
      };
    } else {
      // Of the exponential's first, second and fourth power.
      const float first = terms.on_student + (kCe ? 0.0f : terms.on_ce), on_ce = terms.on_ce, on_teacher = terms.on_teacher;
      const float second = p.power == 2 ? on_ce : 0.0f, fourth = p.power == 4 ? on_ce : 0.0f;
      return [=, &p = p](float s, float e_t) {
        if constexpr (kAny) return fmaf(power_of_two(s), first, fmaf(power_of_two(p.power * s), on_ce, -(e_t * on_teacher)));
        const float by = kCe ? fmaf(s, fmaf(s * s, fourth, second), first) : first;
        return fmaf(s, by, -(e_t * on_teacher));
      };
    }
  }

  // The sums put together, the losses, and the gradient.
  SORTKD_DEVICE void finish(Pass& pass, int row) {
    const bool counts = pass.y >= 0;
    const V& access = pass.access;
    Whole whole{{}, pass.scaled, pass.teacher_label, 0, false, false, false};
    Terms on;
    const auto weight_of_row = [&] {
      return p.grad_output && counts ? weight * p.grad_output[row * p.grad_output_stride] : weight;
    };
    const auto make_terms = [&] {
      const float weight = weight_of_row();
      if constexpr (kGeneral) {
        on = {};
        if (counts) on = general_terms(p, whole.sums, whole.scaled, pass.student_label, whole.top, weight);
      } else {
        // The sums of a row that does not count are 0, so that its terms are, and its gradient.
        const KdSums row_sums{sum(whole, kZStudent),
                              sum(whole, kZTeacher),
                              sum(whole, kCross),
                              z_ce(whole),
                              whole.scaled.of_student(pass.student_label),
                              whole.scaled.of_teacher(whole.top)};
        on = kd_terms(p, row_sums, weight, p.temperature_value, p.inverse_temperature);
      }
    };
    const bool by_temperature = kGeneral && p.grad_temperature;
    const auto look_for_far = [&] {
      if constexpr (kGeneral) whole.far = by_temperature && is_far(whole.sums);
    };
    if constexpr (kKind == Kind::Lanes) {
      const RowSums sums = converted(pass.sums);
      whole.sums = kOneRow ? warp_summed(sums) : group.merged(sums);
      whole.slow = counts & !scaled(pass, whole, sum(whole, kZTeacher));
      whole.near = pass.near;
      whole.listed = pass.listed;
      if (pass.rotated) whole.top = *values_of_row();
      if (whole.near) {
        group.sync();
        Part<kSums> part;
        add_list(part, pass, whole, group.member, group.size, true);
        part = group.merged(part);
        if (whole.listed > 0) join_list(pass, whole, part);
      }
      if (any(whole.slow)) sum_again(pass, whole);
      look_for_far();
      if (any(whole.far)) recentre(pass, whole);
      make_terms();
    } else {
      Posted& posted = *reinterpret_cast<Posted*>(shared_memory() + p.list.notes);
      gather(pass, whole);
      if (group.leads()) {
        whole.slow = counts & !scaled(pass, whole, sum(whole, kZTeacher));
        if (whole.near) {
          Part<kSums> part;
          add_list(part, pass, whole, static_cast<int>(threadIdx.x), kWarp, true);
          join_list(pass, whole, warp_merged(part));
        }
      }
#pragma unroll 1
      for (bool again = false;; again = true) {
        if (group.leads()) {
          look_for_far();
          if (!whole.far) make_terms();
          // No warp still reads the row before's: each sent its part of these sums after it had.
          if (threadIdx.x == 0) {
            if (whole.far)
              posted.sums = whole.sums, posted.top = whole.top;
            else
              posted.on = on;
            posted.listed = whole.listed, posted.slow = whole.slow, posted.far = whole.far;
          }
        }
        __syncthreads();
        if (again) break;
        whole.listed = posted.listed, whole.slow = posted.slow;
        whole.near = is_near(whole.listed);
        if (whole.listed > 0 && !whole.near) {
          if (group.member == 0) put_off(p, row, whole.listed % kTooMany);
          return;
        }
        if (!whole.slow) break;
        sum_again(pass, whole);
      }
      whole.far = kGeneral && posted.far;
      if (whole.far) {
        whole.sums = posted.sums, whole.top = posted.top;
        recentre(pass, whole);
        if (group.leads()) make_terms();
        if (threadIdx.x == 0) posted.on = on;
        __syncthreads();
      }
      on = posted.on;
    }
    if (by_temperature && group.leads()) put_pending(pass, whole, row, weight_of_row());
    if (here(row) && group.member == 0) {
      write_row(p, group.slot, row, on.kd, on.ce, whole.listed);
      if (kKind == Kind::Block && p.overflow) p.overflow[row] = 0;
    }
    if (p.grad) {
      // Of what pass.s and pass.t have.
      const auto gradient = gradient_by(whole.scaled, on);
      const auto gradient_of = [&](float a, float b) {
        const float u = whole.scaled.of_student(a), e_t = power_of_two(whole.scaled.of_teacher(b));
        return gradient(kGeneral ? fmaxf(u, Base::kLeast) : kAny ? u : power_of_two(u), e_t);
      };
      const bool by_class = whole.slow || p.scalar_grads;
      const int end = here(row) && !by_class ? access.whole() - first_vector : 0;
      uint4* const to = compiler_barrier(access.grad4(first_vector));
      const auto write = [&](const auto& gradient) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          float grads[W];
#pragma unroll
          for (int i = 0; i < W; ++i) grads[i] = gradient(pass.s[j * W + i], pass.t[j * W + i]);
          store_if(stride() * j < end && (j > 0 || first_vector >= access.begin()), to + stride() * j, pack<X>(grads));
        }
      };
      if (!kGeneral || p.with_ce)
        write(gradient);
      else
        write(gradient_by<false>(whole.scaled, on));
      if (here(row) && (by_class || !p.aligned))
        each_edge(group, p.C, by_class ? p.C : access.before(), by_class ? p.C : access.after(), [&](int c) {
          const float t = teacher_of(pass, c);
          if (c == pass.y || (counts && whole.near && t > threshold_of(pass))) return;  // written below
          access.put(c, counts ? gradient_of(access.student(c), t) : 0.0f);
        });
      // By the threads that have written their vectors, so after these; the list of lanes, which are in step, by all of them.
      if (pass.has_label) access.put(pass.y, at_label(on));
      if (kKind == Kind::Lanes && whole.near) {
        group.sync();
#pragma unroll 1
        for (int at = group.member; at < whole.listed; at += group.size)
          access.put(near[at].entry.c(), gradient_of(near[at].student, near[at].teacher));
      } else if (whole.near) {
#pragma unroll 1
        for (unsigned higher = pass.higher; higher; higher &= higher - 1) {
          const int n = __ffs(static_cast<int>(higher)) - 1;
          const Near& entry = *near.find(class_of(access, n / W, n % W), whole.listed);
          access.put(entry.entry.c(), gradient_of(entry.student, entry.teacher));
        }
      }
    }
    if (kKind == Kind::Lanes && (whole.near || pass.rotated)) group.sync();  // the next row's take the place
  }
};

template <class X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
__global__ void __launch_bounds__(most_threads(kKind, kMode), held_warps(kKind, kMode) * 32 / most_threads(kKind, kMode))
    sort_kd_held(const __grid_constant__ Params<float> p) {
  const int log_lanes = kLogLanes >= 0 ? kLogLanes : p.log_lanes;
  Group<kKind> group(log_lanes, p.cluster);
  const int slots = kKind == Kind::Lanes ? static_cast<int>(blockDim.x) >> log_lanes : 1;
  if (p.reduced && group.member == 0) totals_of(p, group.slot) = {0, 0};
  group.open();
  allow_next_launch();                      // that for long lists, which waits
  if (!p.counts) wait_for_launch_before();  // or the launch that counts has waited
  HeldRows<X, kKind, kHeld, kLogLanes, kMode> rows(p, group);
  rows.run(group.index() * slots + group.slot);
  if (p.reduced) {
    if (kKind == Kind::Lanes) __syncthreads();
    if (threadIdx.x < kWarp && group.is_first_block()) reduce(p, slots, group.index());
  }
  group.close();
}

// The kernel of a mode that is not general.
template <class X, Kind kKind, int kHeld, int kLogLanes>
auto kd_held(Mode mode) {
  return mode == Mode::Kd ? sort_kd_held<X, kKind, kHeld, kLogLanes, Mode::Kd>
                          : sort_kd_held<X, kKind, kHeld, kLogLanes, Mode::KdCe>;
}

}  // namespace cuda
}  // namespace sortkd
