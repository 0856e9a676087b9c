// Rows that their threads hold: KD, and KD with the cross-entropy at temperatures 1, 2 and 4. A logit is read once and
// takes one exponential.
//
// A thread's vectors come through shared memory, which no other thread needs: while a row is computed, the next one is
// on its way there. In shared memory a class has an index, so what a row must not count is blanked before it is loaded
// into registers: the classes of its neighbours, the label, and the classes above the label, which are put on a list;
// trained teachers have few. The list's classes join the sums with their corrected values, and their gradients, as the
// label's, go over the row's. So the passes over registers are plain KD, and nothing is subtracted from a sum.
//
// Exponentials are relative to the label's own logits, which takes no search for maxima. Where a sum then leaves the
// range of its type the row is read again, class by class, relative to its maxima.
#pragma once

#include "access.cuh"
#include "kd_terms.cuh"
#include "reduce.cuh"

namespace sortkd {
namespace cuda {

// What is put together of a row's classes, or of those on its list.
template <int n>
struct Part {
  Sums<float, n> sums{};
  float student = -kInfinity<float>, teacher = -kInfinity<float>;  // the largest logits
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

// kLogLanes: of the lanes of a row, -1 where the launch says.
template <typename X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
struct HeldRows {
  using V = Vectors<X>;
  static constexpr int W = V::W, kValues = kHeld * W;
  static constexpr bool kCe = kMode == Mode::KdCe;
  static constexpr float kLowest = -kInfinity<float>;
  // What a blank class holds: beside a label that is small its exponentials are 0, and their product with the difference
  // of the exponents is a number. Halves have no such number.
  static constexpr bool kBlankIsFinite = !std::is_same_v<X, Half>;
  static constexpr float kBlank = kBlankIsFinite ? -0x1p100f : kLowest;
  enum { kZStudent, kZTeacher, kCross, kZCe };
  static constexpr int kSums = kCe ? 4 : 3;
  using RowSums = Sums<float, kSums>;
  // Whether the threads that take their steps together have one row, so that there is no row beyond the last.
  static constexpr bool kOneRow = kKind == Kind::Block || kLogLanes == 5;
  // From a vector of a thread to its next one, and from the student's to the teacher's.
  static constexpr int kNext = kWarp, kTeacher = kHeld * kWarp;

  // Of a row that is on its way. A block's threads do not see each other's copies: each loads the label's logits, and
  // for that the label comes a row earlier.
  struct Coming {
    int64_t label, after;  // of this row, and of a block's next one
    X student, teacher;    // of a block's row, at the label
  };

  // What is left of a row's logits.
  struct Pass {
    V access;
    float s[kValues], t[kValues];  // their exponentials
    RowSums sums;                  // of this thread
    float student_label, teacher_label, threshold;
    float offset_s, offset_t;  // of the exponents
    int y;                     // the label; -1: the row does not count
    bool has_label;            // its class is the thread's
    unsigned higher;           // a bit for each class that is put on the list
    bool fix = false;          // of lanes: one of the rows that take their steps together has a list
    bool shares = false;       // and one of them a list that takes the place of the next row's logits
  };

  // What is known of a row by all of its threads.
  struct Whole {
    RowSums sums;
    float offset_s, offset_t;  // of the exponents
    float top;                 // the label's corrected logit
    int listed;                // entries of the list
    bool fix, slow;            // a row with a list; one that leaves the range of its sums
  };

  // What the first warp of a block has found out for the others.
  struct alignas(16) Posted {
    KdTerms on;
    int fix, slow;
    RowSums sums;
  };
  static_assert(sizeof(Posted) <= kNoteBytes);

  const Params<float>& p;
  Group<kKind>& group;
  List<float, kKind, false> list;
  const int first_vector;  // of the thread
  uint4* const stage;
  const int rows;
  const float scale;
  float weight;       // of a row in the result
  const bool fourth;  // whether e^4 is the exponential of the cross-entropy

  SORTKD_DEVICE HeldRows(const Params<float>& p, Group<kKind>& group)
      : p(p),
        group(group),
        list(p.list, group),
        first_vector(kKind == Kind::Lanes ? group.member
                                          : group.member / static_cast<int>(kWarp) * (kHeld * static_cast<int>(kWarp)) +
                                                static_cast<int>(lane_id())),
        stage(compiler_barrier(reinterpret_cast<uint4*>(shared_memory() + p.stage) +
                               threadIdx.x / kWarp * (stage_bytes(kKind, kHeld, W) / 16) + lane_id())),
        rows(static_cast<int>(p.rows)),
        scale(p.inverse_temperature * static_cast<float>(kLog2e)),
        weight(1),
        fourth(p.power == 4) {}

  SORTKD_DEVICE int log_lanes() const { return kLogLanes >= 0 ? kLogLanes : p.log_lanes; }
  // From a thread's vector of the row to its next one: a block's warps have neighbouring vectors each.
  SORTKD_DEVICE int stride() const { return kKind == Kind::Lanes ? group.size : static_cast<int>(kWarp); }

  SORTKD_DEVICE bool here(int row) const { return kOneRow || row < rows; }
  // Whether one of the rows that take their steps together says so.
  SORTKD_DEVICE bool any(bool says) const { return kOneRow ? says : group.any(says); }

  // Starts the row's way to shared memory.
  SORTKD_DEVICE void fetch(int row, Coming& coming) const {
    if constexpr (kKind == Kind::Block) coming.label = coming.after;
    if (row >= rows) return;
    const V access(p, row);
    if constexpr (kKind == Kind::Block) {
      if (is_class(coming.label)) {
        coming.student = *access.student_at(static_cast<int>(coming.label));
        coming.teacher = *access.teacher_at(static_cast<int>(coming.label));
      }
      if (p.step < rows - row) coming.after = p.target[row + p.step];
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
  SORTKD_DEVICE bool is_class(int64_t label) const { return static_cast<uint64_t>(label) < static_cast<unsigned>(p.C); }

  // Class i of vector j of the thread that is `lanes` further.
  SORTKD_DEVICE X* staged(int j, int i, int lanes = 0) const { return reinterpret_cast<X*>(stage + lanes + kNext * j) + i; }
  SORTKD_DEVICE void blank(int j, int i) const {
    *staged(j, i) = narrowed<X>(kBlank);
    staged(j, i)[kTeacher * W] = narrowed<X>(kBlank);
  }
  SORTKD_DEVICE int class_of(const V& access, int j, int i) const {
    return (first_vector + stride() * j) * W + i - access.head;
  }

  // Where p is 0 a class counts 0, whatever q.
  static SORTKD_DEVICE void add_cross(RowSums& sums, float u, float v, float e_t) {
    if (e_t != 0.0f) sums.of[kCross] = fmaf(e_t, v - u, sums.of[kCross]);
  }
  template <bool kFinite>
  SORTKD_DEVICE void add(RowSums& sums, float u, float v, float e, float e_t) const {
    sums.of[kZStudent] += e;
    sums.of[kZTeacher] += e_t;
    if constexpr (kFinite)
      sums.of[kCross] = fmaf(e_t, v - u, sums.of[kCross]);
    else
      add_cross(sums, u, v, e_t);
    // e^4 or e^2, with no branch; e itself has been added.
    if constexpr (kCe) sums.of[kZCe] = fmaf(e * e, fourth ? e * e : 1.0f, sums.of[kZCe]);
  }

  // All rows of the group, each one on its way while the one before is computed. Where a row's list lies in the memory of
  // the next one's logits, that one waits.
  SORTKD_DEVICE void run(int row) {
    Coming coming{};
    if (kKind == Kind::Block && row < rows) coming.after = p.target[row];
    fetch(row, coming);
    if (p.mean) {
      const int count = counted_rows(p);
      weight = count > 0 ? reciprocal(static_cast<float>(count)) : 0.0f;
    }
    const int lane_row = kOneRow ? 0 : static_cast<int>(lane_id()) >> log_lanes();
#pragma unroll 1
    while (row - lane_row < rows) {
      Pass pass{V(p, here(row) ? row : 0)};
      take(pass, row, coming);
      finish(pass, row);
      row += p.step;
      if (pass.shares) fetch(row, coming);
    }
  }

  // The pass that takes the exponentials and their sums. The next row leaves as soon as this one is in registers: what a
  // thread has begun to read from shared memory it has long before a copy that begins later arrives there.
  SORTKD_DEVICE void take(Pass& pass, int row, Coming& coming) const {
    const int64_t label = coming.label;
    assert((is_class(label) || label == p.config.ignore_index) && "a label is outside [0, C)");
    const bool counts = here(row) && is_class(label) && static_cast<int>(label) != p.ignored;
    const V& access = pass.access;
    const int y = counts ? static_cast<int>(label) : 0;
    const unsigned place = static_cast<unsigned>(y + access.head);
    const int label_vector = static_cast<int>(place / W), label_i = static_cast<int>(place % W);
    // A block's warp has kHeld vectors of each lane.
    const int label_j = kKind == Kind::Lanes ? label_vector >> log_lanes() : label_vector >> 5 & (kHeld - 1);
    pass.y = counts ? y : -1;
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
    pass.threshold = pass.teacher_label + p.over_label;
    pass.higher = 0;
    const auto load_teacher = [&] {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) raw_t[j] = stage[kTeacher + kNext * j];
    };
    load_teacher();
    if (largest_of<X, kHeld>(raw_t) > pass.threshold) {
#pragma unroll 1
      for (int j = compiler_barrier(kHeld) - 1; j >= 0; --j) {  // a count that is not known is not unrolled
        float values[W];
        unpack<X>(stage[kTeacher + kNext * j], values);
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < W; ++i) bits |= values[i] > pass.threshold ? 1u << i : 0u;
        pass.higher = pass.higher << W | bits;
      }
#pragma unroll 1
      for (unsigned left = pass.higher; left; left &= left - 1) {
        const int n = __ffs(static_cast<int>(left)) - 1, c = class_of(access, n / W, n % W);
        // What is blank is above a label of -infinity.
        if (static_cast<unsigned>(c) < static_cast<unsigned>(p.C) && c != y)
          staged(n / W, n % W)[kTeacher * W] = narrowed<X>(kBlank);
        else
          pass.higher ^= 1u << n;
      }
      load_teacher();
    }
    if constexpr (kKind == Kind::Lanes) {
      pass.fix = __any_sync(kFullMask, pass.higher);
      pass.shares = __any_sync(kFullMask, __popc(pass.higher) > kNearEntries);
    }
    if (!pass.shares) fetch(row + p.step, coming);

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
        add<kBlankIsFinite>(pass.sums, u, v, s[i], t[i]);
        if constexpr (kCe) s[i] = compiler_barrier(s[i]);  // its square is not kept
      }
    }
    if (kBlankIsFinite && pass.sums.of[kCross] != pass.sums.of[kCross]) {  // logits of -infinity
      pass.sums.of[kCross] = 0;
#pragma unroll 1
      for (int n = compiler_barrier(kValues) - 1; n >= 0; --n) {
        const int c = class_of(access, n / W, n % W);
        if (static_cast<unsigned>(c) >= static_cast<unsigned>(p.C) || c == y || pass.higher >> n & 1) continue;
        const float v = fmaf(access.teacher(c), scale, pass.offset_t);
        add_cross(pass.sums, fmaf(access.student(c), scale, pass.offset_s), v, power_of_two(v));
      }
    }
  }

  // Whether the sums keep their range, z_t of the teacher.
  SORTKD_DEVICE bool scaled(const Pass& pass, const Whole& whole, float z_t) const {
    const float most = kMostOfKd * static_cast<float>(p.C), most_ce = kMostOfCe * static_cast<float>(p.C);
    const float label = fmaxf(fabsf(pass.student_label), fabsf(pass.teacher_label));
    const bool is_small = label < -kBlank / 2;  // no infinite one is; a NaN is in the sums
    return is_small & well_scaled(whole.sums.of[kZStudent], most) & well_scaled(z_t, most) &
           (!kCe | well_scaled(z_ce(whole), most_ce));
  }
  SORTKD_DEVICE float z_ce(const Whole& whole) const { return whole.sums.of[kCe ? kZCe : kZStudent]; }

  // Adds what the list has to the sums, or makes them again, relative to the maxima. False where the list has no room.
  SORTKD_DEVICE bool complete(const Pass& pass, Whole& whole, int row) {
    const V& access = pass.access;
    const bool has_list = whole.fix && group.keeps_list();
    if (whole.fix) {
      const auto places = group.places_of(__popc(pass.higher));
      whole.listed = places.all;
      if (kKind == Kind::Block && whole.listed > p.list.room) {
        if (group.member == 0) p.overflow[row] = whole.listed;
        return false;
      }
      int at = places.first;
      if constexpr (kKind == Kind::Lanes) {
        list.near = !pass.shares;
        __syncwarp();  // a list may take the place of logits that other lanes have loaded
      }
#pragma unroll 1
      for (unsigned higher = pass.higher; higher; higher &= higher - 1) {
        const int n = __ffs(static_cast<int>(higher)) - 1, c = class_of(access, n / W, n % W);
        list.put(at++, access.teacher(c), c);
      }
      group.sync();
      if (group.keeps_list()) list.put_in_order(whole.listed);
    }

    // The list; and where a sum leaves its range, which the list can make it do, the maxima, and the sums relative to
    // these. The rows of a warp take the steps together.
    enum { kList, kMaxima, kAgain };
    float second = pass.teacher_label;
#pragma unroll 1
    for (int step = whole.fix ? kList : kMaxima;; ++step) {
      Part<kSums> part;
#pragma unroll 1
      for (int c = group.member; step != kList && whole.slow && c < p.C; c += group.size) {
        if (c == pass.y) continue;
        const float a = access.student(c), b = access.teacher(c);
        const bool high = b > pass.threshold;
        const float u = fmaf(a, scale, whole.offset_s), v = fmaf(b, scale, whole.offset_t);
        part.student = fmaxf(part.student, a), part.teacher = fmaxf(part.teacher, high ? kLowest : b);
        add<false>(part.sums, u, v, power_of_two(u), high ? 0.0f : power_of_two(v));
      }
#pragma unroll 1
      for (int at = group.list_member(); has_list && at < whole.listed && (step == kList || (step == kAgain && whole.slow));
           at += group.list_size()) {
        // All blocks learn the two largest of the teacher.
        if (step == kList && at == 0) part.teacher = list[0].value();
        if (step == kList && at == 1) part.student = list[1].value();
        const float u = fmaf(access.student(list[at].c()), scale, whole.offset_s);
        const float v = fmaf(corrected(pass, whole, at), scale, whole.offset_t);
        const float e_t = power_of_two(v);
        part.sums.of[kZTeacher] += e_t;
        add_cross(part.sums, u, v, e_t);
      }
      part = group.merged(part);
      if (step == kMaxima) {
        if (!whole.slow) continue;
        if (whole.listed > 0) part.teacher = fmaxf(part.teacher, second);
        whole.offset_s = -(reference_of(part.student, pass.student_label) * scale);
        whole.offset_t = -(reference_of(part.teacher, pass.teacher_label) * scale);
        whole.sums = {};
        continue;
      }
      if (step == kList && whole.listed > 0) {
        whole.top = part.teacher;
        if (whole.listed > 1) second = part.student;
        if (p.config.correction == Correction::None) second = whole.top;
        // What is on the list is the largest there is of the teacher.
        const float v = fmaf(second, scale, whole.offset_t);
        whole.slow = pass.y >= 0 && !(v < log2_of(256 * static_cast<float>(p.C)) &&
                                      scaled(pass, whole, v > -80 ? 1.0f : whole.sums.of[kZTeacher]));
      }
      whole.sums.merge(part.sums);
      if (step == kAgain || !any(whole.slow)) break;
    }
    if (p.config.correction == Correction::None) whole.top = pass.teacher_label;
    return true;
  }
  SORTKD_DEVICE float corrected(const Pass& pass, const Whole& whole, int at) const {
    return list.corrected(at, p.config.correction, whole.listed, pass.teacher_label);
  }

  // The sums put together, the losses, and the gradient.
  SORTKD_DEVICE void finish(const Pass& pass, int row) {
    const bool counts = pass.y >= 0;
    const V& access = pass.access;
    Whole whole{{}, pass.offset_s, pass.offset_t, pass.teacher_label, 0, false, false};
    // The rows of a warp take the steps of the list together.
    whole.fix = kKind == Kind::Block ? pass.higher : pass.fix;
    KdTerms on;
    const auto make_terms = [&] {
      const KdSums row_sums{whole.sums.of[kZStudent],
                            whole.sums.of[kZTeacher],
                            whole.sums.of[kCross],
                            z_ce(whole),
                            fmaf(pass.student_label, scale, whole.offset_s),
                            fmaf(whole.top, scale, whole.offset_t)};
      // The sums of a row that does not count are 0, so that its terms are, and its gradient.
      float weight = this->weight;
      if (p.grad_output && counts) weight *= p.grad_output[row * p.grad_output_stride];
      on = kd_terms(p, row_sums, weight, p.temperature_value, p.inverse_temperature);
    };
    whole.sums = kOneRow ? group.merged(pass.sums, whole.fix) : group.merged(pass.sums);
    if (group.leads()) whole.slow = counts & !scaled(pass, whole, whole.sums.of[kZTeacher]);
    if constexpr (kKind == Kind::Lanes) {
      if (whole.fix || any(whole.slow)) complete(pass, whole, row);
      make_terms();
    } else {
      Posted& posted = *reinterpret_cast<Posted*>(shared_memory() + p.list.notes);
#pragma unroll 1
      for (bool completed = false;; completed = true) {
        if (group.leads()) {
          make_terms();
          // No warp still reads the row before's: each sent its part of these sums after it had.
          if (threadIdx.x == 0) posted = {on, whole.fix, whole.slow, whole.sums};
        }
        __syncthreads();
        on = posted.on;
        whole.fix = posted.fix, whole.slow = posted.slow;
        if (completed || !(whole.fix || whole.slow)) break;
        whole.sums = posted.sums;
        if (!complete(pass, whole, row)) return;
      }
    }
    if (here(row) && group.member == 0) {
      write_row(p, group.slot, row, on.kd, on.ce, whole.listed);
      if (kKind == Kind::Block && p.overflow) p.overflow[row] = 0;
    }
    if (p.grad) {
      // Of the exponential's first, second and fourth power.
      const float first = on.on_student + (kCe ? 0.0f : on.on_ce);
      const float second = p.power == 2 ? on.on_ce : 0.0f, fourth = p.power == 4 ? on.on_ce : 0.0f;
      const auto gradient = [&](float e, float e_t) {
        const float by = kCe ? fmaf(e, fmaf(e * e, fourth, second), first) : first;
        return fmaf(e, by, -(e_t * on.on_teacher));
      };
      const auto gradient_of = [&](float a, float b) {
        return gradient(power_of_two(fmaf(a, scale, whole.offset_s)), power_of_two(fmaf(b, scale, whole.offset_t)));
      };
      if (whole.fix) {
        // While the logits are there still.
        if (group.keeps_list())
          list.replace_values(whole.listed,
                              [&](int at) { return gradient_of(access.student(list[at].c()), corrected(pass, whole, at)); });
        if (p.inplace) group.sync();
      }
      const bool by_class = whole.slow || p.scalar_grads;
      const int end = here(row) && !by_class ? access.whole() - first_vector : 0;
      uint4* const to = compiler_barrier(access.grad4(first_vector));
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        float grads[W];
#pragma unroll
        for (int i = 0; i < W; ++i) grads[i] = gradient(pass.s[j * W + i], pass.t[j * W + i]);
        store_if(stride() * j < end && (j > 0 || first_vector >= access.begin()), to + stride() * j, pack<X>(grads));
      }
      if (here(row) && (by_class || !p.aligned))
        put_edges(access, group, p.C, by_class ? p.C : access.before(), by_class ? p.C : access.after(), pass.y,
                  [&](int c) { return counts ? gradient_of(access.student(c), access.teacher(c)) : 0.0f; });
      // By the thread that has written the label's vector, so after it; class by class, by nobody.
      if (pass.has_label) access.put(pass.y, on.at_label);
      if (whole.fix) {
        group.sync();
        if (group.keeps_list())
#pragma unroll 1
          for (int at = group.list_member(); at < whole.listed; at += group.list_size())
            access.put(list[at].c(), list[at].number());
      }
    }
    if (kKind == Kind::Lanes && whole.fix) group.sync();  // the next row's logits take the list's place
  }
};

// Of lanes, by the classes that a thread holds.
constexpr int least_held_blocks(int values) { return values == kValuesHeld ? 4 : 6; }

template <class X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
__global__ void __launch_bounds__(kKind == Kind::Lanes ? kSmallBlock : kMostRowBlock,
                                  kKind == Kind::Lanes ? least_held_blocks(kHeld* kWidth<X>) : 1)
    sort_kd_held(const __grid_constant__ Params<float> p) {
  const int log_lanes = kLogLanes >= 0 ? kLogLanes : p.log_lanes;
  Group<kKind> group(log_lanes, p.cluster);
  const int slots = kKind == Kind::Lanes ? static_cast<int>(blockDim.x) >> log_lanes : 1;
  if (group.keeps_list()) open_ticket(p);
  if (p.reduced && group.member == 0) totals_of(p, group.slot) = {0, 0};
  group.open();
  HeldRows<X, kKind, kHeld, kLogLanes, kMode> rows(p, group);
  rows.run(group.index() * slots + group.slot);
  if (p.reduced && group.keeps_list()) reduce(p, slots, group.index());
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
