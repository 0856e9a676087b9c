// Rows that their threads hold. A logit is read once and takes one exponential; two more, and one in the gradient again,
// the student's beside a cross-entropy at temperatures other than 1, 2 and 4. In the general mode threads hold the
// exponents, for what is known only when a pass over the row is done, and take the exponentials in each pass.
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

#include "access.cuh"
#include "general.cuh"
#include "near_list.cuh"
#include "reduce.cuh"
#include "rotate.cuh"

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

// kLogLanes: of the lanes of a row, -1 where the launch says.
template <typename X, Kind kKind, int kHeld, int kLogLanes, Mode kMode>
struct HeldRows {
  using V = Vectors<X>;
  static constexpr int W = V::W, kValues = kHeld * W;
  static constexpr bool kGeneral = kMode == Mode::General, kAny = kMode == Mode::KdCeAny, kCe = kMode != Mode::Kd;
  static constexpr float kLowest = -kInfinity<float>;
  // What a blank class holds: beside a label that is small its exponentials are 0, and their product with the difference
  // of the exponents is a number. Halves have no such number, and z-scores may make it infinite.
  static constexpr bool kBlankIsFinite = !std::is_same_v<X, Half> && !kGeneral;
  static constexpr float kBlank = kBlankIsFinite ? -0x1p100f : kLowest;
  static constexpr int kSums = kGeneral ? kGeneralSums : kCe ? 4 : 3;
  using ThreadSums = Sums<float, kSums>;
  using RowSums = Sums<std::conditional_t<kGeneral, double, float>, kSums>;
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
  // More classes than there are: what a block's warp adds to its number of those above the label if its list has no room.
  static constexpr int kTooMany = 1 << 20;

  // What a row's logits are turned into, by both sides' scales and references.
  struct KdRow {
    Exponent<float, kMode> of_student, of_teacher;
  };
  using Scaled = std::conditional_t<kGeneral, GeneralRow<float>, KdRow>;

  // What is left of a row's logits.
  struct Pass {
    V access;
    float s[kValues], t[kValues];  // their exponentials; at any temperature, of the student the exponents; in general both's
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
    float top;        // the label's corrected logit
    int listed;       // classes above the label; of a block with too many for its list, with kTooMany
    bool near, slow;  // a row with a list; one that leaves the range of its sums
  };

  using Terms = std::conditional_t<kGeneral, GeneralTerms<float>, KdTerms>;

  // What the first warp of a block has found out for the others.
  struct alignas(16) Posted {
    Terms on;
    int listed, slow;  // as Whole
    float top;
    RowSums sums;
  };
  static_assert(sizeof(Posted) <= kNoteBytes);

  const Params<float>& p;
  Group<kKind>& group;
  NearList<kKind> near;
  PendingRows pending;     // of the general mode
  const int first_vector;  // of the thread
  uint4* const stage;
  const int rows;
  const float scale;
  float weight;       // of a row in the result
  const bool fourth;  // whether e^4 is the exponential of the cross-entropy

  SORTKD_DEVICE HeldRows(const Params<float>& p, Group<kKind>& group)
      : p(p),
        group(group),
        near(p.list, group),
        pending(p, kKind == Kind::Lanes ? static_cast<int>(threadIdx.x / kWarp) : 0),
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
      sums.of[kMomentStudent] = e != 0.0f ? fmaf(e, u, sums.of[kMomentStudent]) : sums.of[kMomentStudent];
    else if constexpr (kAny)
      sums.of[kZCe] += power_of_two(p.power * u);
    else if constexpr (kCe)
      sums.of[kZCe] = fmaf(e * e, fourth ? e * e : 1.0f, sums.of[kZCe]);
  }
  // Of the general mode: the sums over what a thread holds.
  template <bool kAll>
  SORTKD_DEVICE void add_held(ThreadSums& sums, const Pass& pass, const Scaled& scaled) const {
#pragma unroll
    for (int n = 0; n < kValues; ++n)
      add<false, kAll>(sums, pass.s[n], pass.t[n], power_of_two(pass.s[n]), power_of_two(pass.t[n]));
    if (!p.with_ce) return;
    const CeExponent exponent(scaled);
#pragma unroll
    for (int n = 0; n < kValues; ++n) sums.of[kZCe] += power_of_two(exponent(pass.s[n]));
  }

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
      if (p.config.standardize) moments = moments_of_warp(pass);
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
        add<kBlankIsFinite>(pass.sums, u, v, e, t[i]);
        if constexpr (!kAny) s[i] = kCe ? compiler_barrier(e) : e;  // its square is not kept
      }
    }
    if constexpr (kGeneral) add_held<false>(pass.sums, pass, pass.scaled);
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

  SORTKD_DEVICE WarpMoments moments_of_warp(const Pass& pass) const {
    const V& access = pass.access;
    // f(s, t) for the classes that are the thread's, relative to the label.
    float s[kValues], t[kValues];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      unpack<X>(stage[kNext * j], s + j * W);
      unpack<X>(stage[kTeacher + kNext * j], t + j * W);
#pragma unroll
      for (int n = j * W; n < (j + 1) * W; ++n) s[n] -= pass.student_label, t[n] -= pass.teacher_label;
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
            f(widened(*staged(j, i)) - pass.student_label, widened(staged(j, i)[kTeacher * W]) - pass.teacher_label);
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
  // What a class above the label is above.
  SORTKD_DEVICE float threshold_of(const Pass& pass) const { return pass.teacher_label + p.over_label; }

  // Blanks the classes above the label, and puts them on the near list if it has room for them; of lanes that have more,
  // rotates them.
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

  // Of the general mode: the sums again, relative to the means, of which the moments are what is left of no cancellation.
  SORTKD_DEVICE void recentre(Pass& pass, Whole& whole) {
    if constexpr (kGeneral) {
      const auto move = [](Exponent<float, kMode>& of, double moment, double z) {
        const float old = of.reference, next = old + static_cast<float>(moment / z) / of.scale;
        if (fabsf(next) < kInfinity<float>) of.reference = next;
        return (of.reference - old) * of.scale;
      };
      const float by_s = move(whole.scaled.of_student, whole.sums.of[kMomentStudent], whole.sums.of[kZStudent]);
      const float by_t = move(whole.scaled.of_teacher, whole.sums.of[kMomentTeacher], whole.sums.of[kZTeacher]);
      Part<kSums> part;
      if (whole.slow) {
        add_classes(part, pass, whole);
      } else {
#pragma unroll
        for (int n = 0; n < kValues; ++n) pass.s[n] -= by_s, pass.t[n] -= by_t;
        add_held<true>(part.sums, pass, whole.scaled);
        if (whole.near) add_list(part, pass, whole, group.member, group.size);
      }
      whole.sums = group.merged(converted(part.sums));
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
  SORTKD_DEVICE auto gradient_by(const Scaled& scaled, const Terms& terms, bool counts) const {
    if constexpr (kGeneral) {
      const Coefficients<float>& on = terms.on;
      const bool standardized = p.config.standardize && counts;  // of a row that does not count the exponents are infinite
      const CeExponent exponent(scaled);
      const float about = scaled.of_student.reference - scaled.student.mean, unit = 1 / scaled.of_student.scale;
      return [=, &p = p](float u, float v) {
        float g = fmaf(power_of_two(u), on.on_student, -(power_of_two(v) * on.on_teacher));
        if (kWithCe && p.with_ce) g = fmaf(power_of_two(exponent(u)), on.on_ce, g);
        return standardized ? fmaf(fmaf(u, unit, about), -on.dstd, g) : g;
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
    Whole whole{{}, pass.scaled, pass.teacher_label, 0, false, false};
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
    const bool recentres = kGeneral && p.grad_temperature;
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
        group.sync();
      }
      if (any(whole.slow)) sum_again(pass, whole);
      if (recentres) recentre(pass, whole);
      make_terms();
      if (recentres) put_pending(pass, whole, row, weight_of_row());
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
          if (!recentres) make_terms();
          // No warp still reads the row before's: each sent its part of these sums after it had.
          if (threadIdx.x == 0) {
            if (recentres)
              posted.sums = whole.sums, posted.top = whole.top;
            else
              posted.on = on;
            posted.listed = whole.listed, posted.slow = whole.slow;
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
      if (recentres) {
        whole.sums = posted.sums, whole.top = posted.top;
        recentre(pass, whole);
        if (group.leads()) make_terms(), put_pending(pass, whole, row, weight_of_row());
        if (threadIdx.x == 0) posted.on = on;
        __syncthreads();
      }
      on = posted.on;
    }
    if (here(row) && group.member == 0) {
      write_row(p, group.slot, row, on.kd, on.ce, whole.listed);
      if (kKind == Kind::Block && p.overflow) p.overflow[row] = 0;
    }
    if (p.grad) {
      // Of what pass.s and pass.t have.
      const auto gradient = gradient_by(whole.scaled, on, counts);
      const auto gradient_of = [&](float a, float b) {
        const float u = whole.scaled.of_student(a), v = whole.scaled.of_teacher(b);
        return gradient(kAny || kGeneral ? u : power_of_two(u), kGeneral ? v : power_of_two(v));
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
        write(gradient_by<false>(whole.scaled, on, counts));
      if (here(row) && (by_class || !p.aligned))
        each_edge(group, p.C, by_class ? p.C : access.before(), by_class ? p.C : access.after(), [&](int c) {
          const float t = teacher_of(pass, c);
          if (c == pass.y || (counts && whole.near && t > threshold_of(pass))) return;  // written below
          access.put(c, counts ? gradient_of(access.student(c), t) : 0.0f);
        });
      // By the threads that have written their vectors, so after these.
      if (pass.has_label) access.put(pass.y, at_label(on));
      if (whole.near) {
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
