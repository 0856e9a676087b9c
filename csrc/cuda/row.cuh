// The rows of a loss: one pass that takes the exponentials and their sums, one that writes the gradient.
//
// A pass is plain KD. The label's slot counts as -infinity in it, and so does each class above the label, which is put
// on a list instead; trained teachers have few. The list's classes join the sums with their corrected values, and their
// gradients, as the label's, go over the row's. So nothing is subtracted from a sum, and no correction slows the pass.
//
// Exponentials are relative to the label's own logits, which takes no search for maxima. Where a sum then leaves the
// range of its type the row is done again, relative to its maxima.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

// ---- Access: `count` vectors of W classes; vector g holds the classes from g * W - head on.

// Vectors of 16 bytes, wherever the row begins: the vectors at its edges hold classes of its neighbours too.
template <typename X>
struct Vectors {
  using T = float;
  static constexpr int W = kWidth<X>;
  const uint4 *student4, *teacher4;
  uint4* grad4;
  int head, count, inner_begin, inner_count;

  SORTKD_DEVICE Vectors(const Params<T>& p, int64_t row) {
    const int64_t first = row * p.C + p.shift;
    student4 = compiler_barrier(reinterpret_cast<const uint4*>(static_cast<const X*>(p.student) - p.shift) + first / W);
    teacher4 = compiler_barrier(reinterpret_cast<const uint4*>(static_cast<const X*>(p.teacher) - p.shift) + first / W);
    grad4 = compiler_barrier(reinterpret_cast<uint4*>(static_cast<X*>(p.grad) - p.shift) + first / W);
    head = static_cast<int>(first % W);
    count = (head + p.C + W - 1) / W;
    inner_begin = head > 0;
    inner_count = max((head + p.C) / W - inner_begin, 0);
  }
  // Classes before and after the vectors that are the row's alone.
  SORTKD_DEVICE int before() const { return inner_begin ? W - head : 0; }
  SORTKD_DEVICE int after() const { return (inner_begin + inner_count) * W - head; }
  SORTKD_DEVICE bool inner(int g) const { return static_cast<unsigned>(g - inner_begin) < static_cast<unsigned>(inner_count); }
  using Raw = uint4;
  SORTKD_DEVICE void fetch(unsigned g, Raw& s, Raw& t) const { s = __ldcs(student4 + g), t = __ldcs(teacher4 + g); }
  static SORTKD_DEVICE void unpacked(const Raw& raw, T* x) { unpack<X>(raw, x); }
  SORTKD_DEVICE T student(int c) const { return widened(reinterpret_cast<const X*>(student4)[c + head]); }
  SORTKD_DEVICE T teacher(int c) const { return widened(reinterpret_cast<const X*>(teacher4)[c + head]); }
  SORTKD_DEVICE void store(unsigned g, const T* grad) const { grad4[g] = pack<X>(grad); }
  SORTKD_DEVICE void put(int c, T grad) const { reinterpret_cast<X*>(grad4)[c + head] = narrowed<X>(grad); }
};

// A class at a time, `inner` apart, of dtypes that the call alone knows. A top-k teacher has no [C]: `teacher` is what
// its absent classes hold.
template <typename Number, bool kTopK>
struct Mixed {
  using T = Number;
  static constexpr int W = 1, head = 0;
  const Params<T>& p;
  int64_t first;
  T absent;
  int count;

  SORTKD_DEVICE Mixed(const Params<T>& p, int64_t row)
      : p(p), first(row / p.inner * p.C * p.inner + row % p.inner), absent(0), count(p.C) {}
  SORTKD_DEVICE bool inner(int g) const { return static_cast<unsigned>(g) < static_cast<unsigned>(count); }
  SORTKD_DEVICE int before() const { return 0; }
  SORTKD_DEVICE int after() const { return count; }
  using Raw = T;
  SORTKD_DEVICE void fetch(unsigned g, Raw& s, Raw& t) const { s = student(g), t = teacher(g); }
  static SORTKD_DEVICE void unpacked(const Raw& raw, T* x) { *x = raw; }
  SORTKD_DEVICE T student(int c) const { return element<T>(p.student, p.student_dtype, first + c * p.inner); }
  SORTKD_DEVICE T teacher(int c) const { return kTopK ? absent : element<T>(p.teacher, p.teacher_dtype, first + c * p.inner); }
  SORTKD_DEVICE void store(int g, const T* grad) const { put(g, *grad); }
  SORTKD_DEVICE void put(int c, T grad) const { set_element(p.grad, p.student_dtype, first + c * p.inner, grad); }
};

template <class A>
constexpr bool kIsMixed = false;
template <typename T, bool kTopK>
constexpr bool kIsMixed<Mixed<T, kTopK>> = true;

// ---- A row

template <typename T>
struct Largest {
  T student, teacher, second;  // `second`: of the teacher, the next largest
  SORTKD_DEVICE void add(T t) {
    second = max(second, min(teacher, t));
    teacher = max(teacher, t);
  }
  SORTKD_DEVICE void merge(const Largest& other) {
    student = max(student, other.student);
    second = max(max(second, other.second), min(teacher, other.teacher));
    teacher = max(teacher, other.teacher);
  }
  SORTKD_DEVICE Largest shuffled_xor(int offset) const {
    return {__shfl_xor_sync(kFullMask, student, offset), __shfl_xor_sync(kFullMask, teacher, offset),
            __shfl_xor_sync(kFullMask, second, offset)};
  }
  static SORTKD_DEVICE Largest none() { return {-kInfinity<T>, -kInfinity<T>, -kInfinity<T>}; }
};

// What the logits of a side are turned into: exponents of two.
template <typename T, Mode mode>
struct Exponent {
  T scale, reference;
  SORTKD_DEVICE T operator()(T x) const {
    // One instruction; its error grows with the logit, not with the difference, which is as much as the logit's own.
    if constexpr (mode != Mode::General) return fma(x, scale, -(reference * scale));
    return (x - reference) * scale;
  }
};

template <typename T>
SORTKD_DEVICE T raised(T e, int power) {
  if (power >= 2) e *= e;
  if (power == 4) e *= e;
  return e;
}

// The scalars of a row are computed by each of its lanes, and would take half as long as its classes: in floats with
// the processor's approximate functions, whose relative error is a few roundings. As row_logs of row_math.h.
SORTKD_DEVICE Binary<float> from_odds(float odds) {
  const float small = power_of_two(-fabsf(odds) * static_cast<float>(kLog2e));
  const float large = __fdividef(1.0f, 1.0f + small);
  // log(1 + small) = 2 artanh(small / (2 + small)), whose argument is at most a third: relative to its size exact.
  const float r = __fdividef(small, 2.0f + small), square = r * r;
  float series = 2.0f / 15;
#pragma unroll
  for (int n = 13; n >= 1; n -= 2) series = fmaf(series, square, 2.0f / static_cast<float>(n));
  const float rest = r * series;
  const bool likely = odds > 0.0f;
  return {likely ? -rest : odds - rest, likely ? -rest - odds : -rest, likely ? large : small * large,
          likely ? small * large : large};
}
SORTKD_DEVICE RowLogs<float> logs_of(const RowSums<float>& sums, bool with_ce) {
  constexpr float kNats = static_cast<float>(kLn2);
  const float log_z_s = log2_of(sums.z_student) * kNats, log_z_t = log2_of(sums.z_teacher) * kNats;
  return {log_z_s, log_z_t, from_odds(sums.v_label_student - log_z_s), from_odds(sums.v_label_teacher - log_z_t),
          with_ce ? from_odds(sums.v_label_ce - log2_of(sums.z_ce) * kNats) : Binary<float>{}};
}
SORTKD_DEVICE RowLogs<double> logs_of(const RowSums<double>& sums, bool with_ce) { return row_logs(sums, with_ce); }

// From 2^-80 on, what was too small to be represented is below a sum's rounding. Far above C, the label is so far below
// the others that the logarithms of the sums would be large numbers with a small difference.
template <typename T>
SORTKD_DEVICE bool well_scaled(T z, T C) {
  return z > static_cast<T>(0x1p-80) && z < T(256) * C;
}

// The rows that count in a mean: not yet known; then those of this thread, loaded while the first row's loads are under
// way; then, as soon as the block has added up, all of them, as the complement.
constexpr int kNotCounted = std::numeric_limits<int>::min();

template <typename T>
SORTKD_DEVICE int counted_by_thread(const Params<T>& p) {
  int n = 0;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (p.counts)
#pragma unroll 1
    for (int b = thread; b < p.count_blocks; b += threads) n += static_cast<int>(p.counts[b]);
  else
#pragma unroll 8
    for (int64_t row = thread; row < p.rows; row += threads) n += p.target[row] != p.config.ignore_index;
  return n;
}

template <class A, Kind kKind, int kHeld, Mode kMode, bool kTopK>
struct Row {
  using T = typename A::T;
  static constexpr int W = A::W;
  static constexpr bool kGeneral = kMode == Mode::General;
  static constexpr int kValues = kHeld > 0 ? kHeld * W : W;
  // z_student, z_teacher, cross, z_ce, and the moments of student, teacher, cross.
  // The moments nearly cancel: their sums over more than a few terms are in double, as what is made of them.
  using S = std::conditional_t<kGeneral, double, T>;
  static constexpr int kSums = kGeneral ? 7 : kMode == Mode::KdCe ? 4 : 3;
  static constexpr T kLowest = -kInfinity<T>;
  static constexpr T kBits = static_cast<T>(kLog2e);

  const Params<T>& p;
  Group<kKind>& group;
  List<T, kKind, kIsMixed<A> && kKind == Kind::Block> list;

  A access;
  bool here, counts;
  int y, label_vector, live;  // live: vectors to read
  T student_label, teacher_label;
  int listed, above;  // entries on the list, and those of them above the label
  Exponent<T, kMode> of_student, of_teacher;
  T ce_reference;

  SORTKD_DEVICE Row(const Params<T>& p, Group<kKind>& group, int64_t row, bool here)
      : p(p), group(group), list(p.list, group), access(p, here ? row : 0), here(here) {}

  SORTKD_DEVICE int class_of(int g, int i) const { return g * W + i - access.head; }

  // f(g, j): the thread's vectors, of those held in registers j-th.
  template <typename F>
  SORTKD_DEVICE void each(int end, F&& f) const {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) f(group.member + group.size * j, j);
    } else {
#pragma unroll 1
      for (int g = group.member; g < end; g += group.size) f(g, 0);
    }
  }
  // Without registers for them, in as little code as possible.
  template <typename F>
  SORTKD_DEVICE void each_other(F&& f) const {
#pragma unroll 1
    for (int g = group.member; g < live; g += group.size) {
      T s[W], t[W];
      load(g, s, t);
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (is_other(class_of(g, i))) f(s[i], t[i]);
    }
  }
  SORTKD_DEVICE void load(int g, T* s, T* t) const {
    typename A::Raw raw_s, raw_t;
    access.fetch(g, raw_s, raw_t);
    A::unpacked(raw_s, s);
    A::unpacked(raw_t, t);
  }
  SORTKD_DEVICE bool in_row(int c) const { return static_cast<unsigned>(c) < static_cast<unsigned>(p.C); }
  SORTKD_DEVICE bool is_other(int c) const { return counts && in_row(c) && c != y; }
  // Of a top-k teacher: a bit for each class that is not as the absent are.
  SORTKD_DEVICE unsigned* present() const { return reinterpret_cast<unsigned*>(shared_memory() + p.list.present); }
  SORTKD_DEVICE bool is_present(int c) const { return kTopK && (present()[c / 32] >> (c % 32) & 1); }
  SORTKD_DEVICE void set_present(int c) const { atomicOr(present() + c / 32, 1u << (c % 32)); }
  SORTKD_DEVICE Totals* totals() const { return reinterpret_cast<Totals*>(shared_memory() + p.totals) + group.slot; }
  // Numbers that one thread of a block has for all.
  SORTKD_DEVICE T* notes() const { return reinterpret_cast<T*>(shared_memory() + p.list.notes); }

  // The value that the correction gives to the p-th entry of the list.
  SORTKD_DEVICE T corrected(int at) const {
    if (p.config.correction == Correction::Sort && at < above) return at + 1 < above ? list[at + 1].value() : teacher_label;
    if (p.config.correction == Correction::Swap && above > 0 && at == 0) return teacher_label;
    return list[at].value();
  }
  SORTKD_DEVICE T corrected_label(T top) const {
    return above > 0 && p.config.correction != Correction::None ? top : teacher_label;
  }

  // The k of a top-k teacher, and of absent classes that are above the label the one that the correction moves: sorted,
  // the last of these ties takes the next lower value; swapped, the first takes the label's.
  SORTKD_DEVICE void list_top_k(int64_t row) {
    const int words = (p.C + 31) / 32;
#pragma unroll 1
    for (int w = group.member; w < words; w += group.size) present()[w] = 0;
    list.clear();
    const ClassIndices indices = ClassIndices{p.teacher_indices, p.int64_indices}.from(row * p.k);
    Sums<double, 2> mass{};  // and the entries that count
    if (group.member == 0) notes()[0] = access.absent = kLowest, notes()[1] = T(0);
    group.sync();
#pragma unroll 1
    for (int j = group.member; counts && j < p.k; j += group.size) {
      const T value = element<T>(p.teacher, p.teacher_dtype, row * p.k + j);
      const int c = static_cast<int>(indices[j]);
      // Of several entries of the label the first one counts.
      bool first = true;
      for (int i = 0; c == y && i < j; ++i) first &= indices[i] != y;
      if (!first) continue;
      mass.of[0] += exp(static_cast<double>(value));
      mass.of[1] += 1;
      set_present(c);
      if (c == y)
        notes()[0] = value, notes()[1] = T(1);
      else
        list.append(value, c);
    }
    if (group.member == 0 && counts) set_present(y);
    mass = group.merged(mass);
    access.absent = tail_logit<T>(p.config.tail == Tail::Uniform, mass.of[0], p.C - static_cast<int>(mass.of[1]));
    teacher_label = notes()[1] == T(1) ? notes()[0] : access.absent;
    group.sync();
    if (counts && access.absent > teacher_label && p.config.correction != Correction::None) {
      const bool last = p.config.correction == Correction::Sort;
      Largest<int> moved{-1, -1, -1};
#pragma unroll 1
      for (int c = group.member; c < p.C; c += group.size)
        if (!is_present(c)) moved.student = max(moved.student, last ? c : p.C - c);
      moved = group.merged(moved);
      const int c = last ? moved.student : p.C - moved.student;
      if (moved.student >= 0 && group.member == 0) {
        set_present(c);
        list.append(access.absent, c);
      }
    }
    group.sync();
    listed = min(*list.count(), p.list.room);
    Sums<int, 1> higher{};
#pragma unroll 1
    for (int at = group.member; at < listed; at += group.size) higher.of[0] += list[at].value() > teacher_label;
    above = group.merged(higher).of[0];
    list.put_in_order(listed);  // also where none moves: the order of sums is fixed
    group.list_sync();
  }

  // In few instructions, and reading them once more: they are rare.
  SORTKD_DEVICE void list_classes(int g, unsigned& higher) const {
#pragma unroll 1
    while (higher) {
      const int i = __ffs(static_cast<int>(higher)) - 1;
      higher &= higher - 1;
      const int c = class_of(g + i / W * group.size, i % W);
      list.append(access.teacher(c), c);
    }
  }

  // Mean and 1 / (std + eps) of both sides, the values relative to the label's: a constant row has a deviation of 0.
  SORTKD_DEVICE void statistics(MeanStd<T>& student, MeanStd<T>& teacher) {
    const T n = static_cast<T>(p.C);
    Sums<T, 2> sums{};
    each_other([&](T s, T t) { sums.of[0] += s - student_label, sums.of[1] += t - teacher_label; });
    sums = group.merged(sums);
    const T mean_s = sums.of[0] / n, mean_t = sums.of[1] / n;
    Sums<T, 2> squares{};
    const auto add = [&](T s, T t) {
      squares.of[0] += (s - student_label - mean_s) * (s - student_label - mean_s);
      squares.of[1] += (t - teacher_label - mean_t) * (t - teacher_label - mean_t);
    };
    if (group.member == 0) add(student_label, teacher_label);
    each_other(add);
    squares = group.merged(squares);
    // 0, or NaN for a row with one.
    const auto deviation = [&](T x) { return p.C > 1 && x > T(0) ? sqrt(x / (n - T(1))) : x - x; };
    student = {student_label + mean_s, deviation(squares.of[0])};
    teacher = {teacher_label + mean_t, deviation(squares.of[1])};
  }

  // Exponentials relative to the maxima of the others.
  SORTKD_DEVICE void refer_to_maxima() {
    Largest<T> largest = Largest<T>::none();
    if constexpr (kTopK) {
#pragma unroll 1
      for (int c = group.member; counts && c < p.C; c += group.size) {
        if (c != y) largest.student = max(largest.student, access.student(c));
        if (!is_present(c)) largest.add(access.absent);
      }
#pragma unroll 1
      for (int at = group.member; at < listed; at += group.size) largest.add(list[at].value());
    } else {
      each_other([&](T s, T t) { largest.student = max(largest.student, s), largest.add(t); });
    }
    largest = group.merged(largest);
    // Above the label, the largest goes to the label.
    if (p.config.correction != Correction::None && largest.teacher > teacher_label)
      largest.teacher = max(largest.second, teacher_label);
    // -infinity has nothing to be relative to.
    of_student.reference = ce_reference = largest.student == kLowest ? T(0) : largest.student;
    of_teacher.reference = largest.teacher == kLowest ? T(0) : largest.teacher;
  }

  SORTKD_DEVICE void add_teacher(Sums<T, kSums>& sums, T u, T v, T e) const {
    sums.of[1] += e;
    if (e != T(0)) {  // where p is 0 the class counts 0, whatever q
      sums.of[2] = fma(e, v - u, sums.of[2]);
      if constexpr (kGeneral) {
        sums.of[5] = fma(e, v, sums.of[5]);
        sums.of[6] = fma(e, v * (v - u), sums.of[6]);
      }
    }
  }
  static SORTKD_DEVICE void add_to(Sums<S, kSums>& sums, const Sums<T, kSums>& some) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums.of[i] += static_cast<S>(some.of[i]);
  }
  SORTKD_DEVICE T ce_exponential(T s, T e) const {
    if constexpr (kMode == Mode::KdCe) return raised(e, p.power);
    return p.with_ce ? power_of_two((s - ce_reference) * kBits) : T(0);
  }

  SORTKD_DEVICE void run(int64_t row, int& counted) {
    const int64_t label = here ? p.target[row] : p.config.ignore_index;
    // All loads are under way before the first is waited for. What is not of the row is read, too.
    T s[kValues], t[kValues];
    constexpr int kRaw = kHeld > 0 ? kHeld : 1;
    typename A::Raw raw_s[kRaw], raw_t[kRaw];
    T threshold, temperature = p.temperature_value, inverse = p.inverse_temperature, top;
    MeanStd<T> statistics_s{}, statistics_t{};
    Sums<S, kSums> sums;
    bool to_maxima, need, centred = !p.moments;
    const auto begin = [&] {
      if (p.mean && counted == kNotCounted) counted = counted_by_thread(p);
      counts = label != p.config.ignore_index;
      assert((!counts || (label >= 0 && label < p.C)) && "a label is outside [0, C)");
      y = counts ? static_cast<int>(label) : 0;
      live = counts ? access.count : 0;
      label_vector = static_cast<int>(static_cast<unsigned>(y + access.head) / W);
      student_label = counts ? access.student(y) : T(0);
      listed = above = 0;
      if constexpr (kTopK)
        list_top_k(row);
      else
        teacher_label = counts ? access.teacher(y) : T(0);
      threshold = p.config.correction != Correction::None || p.rank ? teacher_label : kInfinity<T>;

      of_student.scale = of_teacher.scale = inverse * kBits;
      if constexpr (kGeneral) {
        if (p.temperature) {
          temperature = here ? p.temperature[row * p.temperature_stride] : T(1);
          inverse = T(1) / temperature;
          of_student.scale = of_teacher.scale = inverse * kBits;
        }
        if (p.config.standardize) {
          statistics(statistics_s, statistics_t);
          of_teacher.scale = inverse / (statistics_t.std + static_cast<T>(kStandardizeEps)) * kBits;
          inverse /= statistics_s.std + static_cast<T>(kStandardizeEps);
          of_student.scale = inverse * kBits;
        }
      }
      of_student.reference = ce_reference = student_label;
      of_teacher.reference = teacher_label;

      // Sums of squares want small terms.
      need = to_maxima = counts && (p.moments || !(fabs(student_label) < kInfinity<T> && fabs(teacher_label) < kInfinity<T>));
      top = teacher_label;
    };
    for (bool first = true;; first = false) {
      if (kHeld > 0 && (first || !kGeneral)) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) access.fetch(min(group.member + group.size * j, access.count - 1), raw_s[j], raw_t[j]);
      }
      if (first) begin();
      // The rows of a warp go round together: those that need not have the same sums again.
      if (group.any(need)) {
        const Exponent<T, kMode> old_s = of_student, old_t = of_teacher;
        const T old_plain = ce_reference;
        refer_to_maxima();
        if (!need) of_student = old_s, of_teacher = old_t, ce_reference = old_plain;
        to_maxima |= need;
      }
      if constexpr (!kTopK) list.clear();
      sums = {};
      Sums<T, kSums> some{};
      unsigned higher = 0;  // of the values held, those to be listed: a bit each
      each(live, [&](int g, int j) {
        T own_s[W], own_t[W];
        T *const sv = kHeld > 0 && !kGeneral ? s + j * W : own_s, *const tv = kHeld > 0 && !kGeneral ? t + j * W : own_t;
        if constexpr (kHeld == 0) access.fetch(g, raw_s[0], raw_t[0]);
        A::unpacked(raw_s[j], sv);
        A::unpacked(raw_t[j], tv);
        // What is not of the row, the label, and what is on the list adds nothing.
        T largest = tv[0];
#pragma unroll
        for (int i = 1; i < W; ++i) largest = max(largest, tv[i]);
        if (!access.inner(g) || !counts || g == label_vector || (!kTopK && largest > threshold)) {
#pragma unroll
          for (int i = 0; i < W; ++i) {
            const bool other = is_other(class_of(g, i)), high = !kTopK && other && tv[i] > threshold;
            sv[i] = other ? sv[i] : kLowest;
            tv[i] = other && !high ? tv[i] : kLowest;
            higher |= high ? 1u << (j * W + i) : 0;
          }
        }
        if (is_present(g)) *tv = kLowest;
        if constexpr (kHeld == 0) list_classes(g, higher);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const T u = of_student(sv[i]), v = of_teacher(tv[i]);
          const T e = power_of_two(u), e_t = power_of_two(v);
          some.of[0] += e;
          add_teacher(some, u, v, e_t);
          if constexpr (kMode != Mode::Kd) some.of[3] += ce_exponential(sv[i], e);
          if constexpr (kGeneral)
            if (e != T(0)) some.of[4] = fma(e, u, some.of[4]);
          if constexpr (!kGeneral) sv[i] = e, tv[i] = e_t;
        }
        if (kGeneral && kHeld == 0 && g / group.size % 16 == 15) {
          add_to(sums, some);
          some = {};
        }
      });
      if constexpr (!kTopK) {
        if constexpr (kHeld > 0) list_classes(group.member, higher);
        group.sync();
        listed = above = list.counted();
        if (kKind == Kind::Block && listed > p.list.room) {
          if (group.member == 0) p.overflow[row] = 1;
          group.sync();
          return;
        }
      }
      if (group.any(listed > 0)) {
        if (group.keeps_list()) {
          if (!kTopK) list.put_in_order(listed);  // also where none moves: the order of sums is fixed
#pragma unroll 1
          for (int at = group.list_member(); at < listed; at += group.list_size()) {
            const T u = of_student(access.student(list[at].c())), v = of_teacher(corrected(at));
            add_teacher(some, u, v, power_of_two(v));
          }
          if (above > 0) top = list[0].value();
          if (group.blocks() > 1 && static_cast<int>(threadIdx.x) < group.blocks()) *in_block(notes(), threadIdx.x) = top;
        }
      }
      add_to(sums, some);
      sums = group.merged(sums);
      if (group.blocks() > 1 && above > 0) top = *notes();
      const auto fits = [&](S z) { return well_scaled<S>(z, S(p.C)); };
      need = counts && !to_maxima && !(fits(sums.of[0]) && fits(sums.of[1]) && (kSums < 4 || !p.with_ce || fits(sums.of[3])));
      if (group.any(need)) continue;
      if (!kGeneral || centred) break;
      // Relative to the means, the moments are what is left of no cancellation.
      centred = true;
      if constexpr (kGeneral) {
        const T mean_s = static_cast<T>(sums.of[4] / sums.of[0]) / of_student.scale;
        const T mean_t = static_cast<T>(sums.of[5] / sums.of[1]) / of_teacher.scale;
        if (fabs(mean_s) < kInfinity<T>) of_student.reference += mean_s;
        if (fabs(mean_t) < kInfinity<T>) of_teacher.reference += mean_t;
      }
    }
    finish(row, temperature, inverse, sums, top, statistics_s, counted, s, t, raw_s, raw_t);
  }

  SORTKD_DEVICE void finish(int64_t row, T temperature, T inverse, const Sums<S, kSums>& sums, T top,
                            const MeanStd<T>& statistics, int& counted, T* s, T* t, const typename A::Raw* raw_s,
                            const typename A::Raw* raw_t) {
    RowSums<S> r{};
    constexpr S kNats = static_cast<S>(kLn2);
    r.z_student = sums.of[0], r.z_teacher = sums.of[1], r.cross = sums.of[2] * kNats;
    r.v_label_student = S(of_student(student_label)) * kNats;
    r.v_label_teacher = S(of_teacher(corrected_label(top))) * kNats;
    if constexpr (kMode == Mode::KdCe) {
      r.z_ce = sums.of[3];
      r.v_label_ce = r.v_label_student * static_cast<S>(p.power);
    }
    if constexpr (kGeneral) {
      r.z_ce = sums.of[3];
      r.v_label_ce = student_label - ce_reference;
      r.moment_student = sums.of[4] * kNats, r.moment_teacher = sums.of[5] * kNats;
      r.moment_cross = sums.of[6] * (kNats * kNats);
    }
    LossConfig config = p.config;
    if (!kGeneral) config.standardize = false;
    const bool with_ce = kMode == Mode::KdCe || (kGeneral && p.with_ce);
    const RowTerms<S> terms = row_terms(r, logs_of(r, with_ce), S(temperature), p.decoupled, S(config.alpha), S(p.beta),
                                        with_ce, kGeneral && p.moments);
    if (p.mean && counted >= 0) counted = ~block_merged(Sums<int, 1>{counted}, shared_memory() + p.merging).of[0];
    if (here && group.member == 0) {
      if (p.reduced) {
        Totals& totals = *this->totals();
        if (counts) totals.kd += static_cast<double>(terms.kd), totals.ce += static_cast<double>(terms.ce);
      } else {
        p.loss[row] = counts ? T(weighted(S(config.kd_weight), terms.kd) + weighted(S(config.ce_weight), terms.ce)) : T(0);
        if (p.kd) p.kd[row] = counts ? T(terms.kd) : T(0);
        if (p.ce) p.ce[row] = counts ? T(terms.ce) : T(0);
      }
      if (p.rank) p.rank[row] = rank();
    }
    T weight = here && p.grad_output ? p.grad_output[row * p.grad_output_stride] : T(1);
    if (p.mean) weight /= static_cast<T>(~counted);
    if (kGeneral && p.grad_temperature && here && group.member == 0)
      p.grad_temperature[row] = counts ? weight * T(config.kd_weight) * T(terms.grad_temperature) : T(0);
    if (!p.grad) return;

    const auto of = gradient_coefficients(terms, config, S(weight), S(temperature), S(inverse), S(p.C), S(student_label),
                                          MeanStd<S>{statistics.mean, statistics.std});
    Coefficients<T> on{T(of.on_student), T(of.on_teacher), T(of.on_ce), T(of.at_label), T(of.dstd)};
    if (!counts) on = {};
    // `logit` where the mode asks for more than the exponentials.
    const auto gradient = [&](T e, T e_t, T logit) {
      T g = fma(e, on.on_student, -(e_t * on.on_teacher));
      if constexpr (kMode == Mode::KdCe) g = fma(raised(compiler_barrier(e), p.power), on.on_ce, g);
      if constexpr (kGeneral) {
        if (p.with_ce) g = fma(ce_exponential(logit, e), on.on_ce, g);
        if (config.standardize) g -= on.dstd * (logit - statistics.mean);
      }
      return g;
    };
    const bool fix = group.any(listed > 0);
    if (fix) {
      // While the logits are there still: the gradient may lie in their place. Each entry needs the next one's value.
      if (group.keeps_list()) {
        const int size = group.list_size();
#pragma unroll 1
        for (int first = 0; group.any(first < listed); first += size) {
          const int at = first + group.list_member();
          T g = 0;
          if (at < listed) {
            const T logit = access.student(list[at].c());
            g = gradient(power_of_two(of_student(logit)), power_of_two(of_teacher(corrected(at))), logit);
          }
          group.list_sync();
          if (at < listed) list[at] = list[at].with(g);
        }
      }
      group.sync();
    }
    each(access.count, [&](int g, int j) {
      T grads[W], own_s[W], own_t[W];
      T *const sv = kHeld > 0 ? s + j * W : own_s, *const tv = kHeld > 0 ? t + j * W : own_t;
      if constexpr (kHeld == 0) load(g, sv, tv);
      if constexpr (kHeld > 0 && kGeneral) A::unpacked(raw_s[j], sv), A::unpacked(raw_t[j], tv);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if constexpr (kHeld > 0 && !kGeneral)
          grads[i] = gradient(sv[i], tv[i], T(0));
        else
          grads[i] = counts ? gradient(power_of_two(of_student(sv[i])), power_of_two(of_teacher(tv[i])), sv[i]) : T(0);
      }
      if (here && !p.scalar_grads && access.inner(g)) access.store(g, grads);
    });
    // The classes at the edges, from memory again: in few instructions, and where the gradient lies is theirs alone.
    const int before = max(access.before(), p.scalar_grads), after = max(access.after(), p.scalar_grads);
    const int edges = here ? before + p.C - after : 0;
#pragma unroll 1
    for (int i = group.member; i < edges; i += group.size) {
      const int c = i < before ? i : after + i - before;
      if (c >= p.C || (counts && c == y)) continue;
      T g = 0;
      if (counts) {
        const T logit = access.student(c);
        g = gradient(power_of_two(of_student(logit)), power_of_two(of_teacher(access.teacher(c))), logit);
      }
      access.put(c, g);
    }
    // By the thread that has written the label's vector, so after it.
    if (counts && group.has(label_vector)) access.put(y, on.at_label);
    if (fix) {
      group.sync();
      if (group.keeps_list())
#pragma unroll 1
        for (int at = group.list_member(); at < listed; at += group.list_size()) access.put(list[at].c(), list[at].number());
    }
  }

  SORTKD_DEVICE int rank() const {
    if (!counts) return 0;
    if constexpr (kTopK) {
      // Of absent classes above the label, one may be on the list.
      if (access.absent > teacher_label) return above - (p.config.correction != Correction::None ? 1 : 0) + p.C - p.k;
    }
    return above;
  }
};

// ---- The kernel

// The sum over a call's rows: each block writes its own, and the block of the last launch that ends last adds them up,
// in the order of the blocks and in double. The ticket needs no launch to clear it: it begins as whatever memory holds,
// and counts from the first block that puts the call's own number into it.
template <typename T>
SORTKD_DEVICE void open_ticket(const Params<T>& p) {
  if (!p.ticket || threadIdx.x != 0) return;
  const unsigned long long seen = *static_cast<volatile unsigned long long*>(p.ticket);
  // Where this fails, another block has done it.
  if (seen >> kTicketBits != p.nonce) atomicCAS(p.ticket, seen, p.nonce << kTicketBits);
}

template <bool kMayHaveNoRow, typename T>
SORTKD_DEVICE void reduce(const Params<T>& p, int counted, int rows, int index) {
  if (kMayHaveNoRow && p.mean && (counted >= 0 || counted == kNotCounted)) {
    if (counted == kNotCounted) counted = counted_by_thread(p);
    counted = ~block_merged(Sums<int, 1>{counted}, shared_memory() + p.merging).of[0];
  }
  __syncthreads();
  Sums<double, 2> sums{};
  if (static_cast<int>(threadIdx.x) < rows) {
    const Totals& totals = reinterpret_cast<const Totals*>(shared_memory() + p.totals)[threadIdx.x];
    sums = {totals.kd, totals.ce};
  }
#pragma unroll 1
  for (bool own = true;; own = false) {  // the block's own rows, then the blocks
    sums = block_merged(sums, shared_memory() + p.merging);
    if (!own) break;
    bool last = false;
    if (threadIdx.x == 0) {
      double* const mine = p.partials + 2 * (p.partials_before + index);
      mine[0] = sums.of[0], mine[1] = sums.of[1];
      __threadfence();
      if (p.ticket) {
        const unsigned long long before = atomicAdd(p.ticket, 1ull);
        last = (before & ((1ull << kTicketBits) - 1)) == static_cast<unsigned>(p.groups - 1);
        if (last) *p.ticket = 0;  // a graph may be replayed
      }
    }
    if (!__syncthreads_or(last)) return;
    __threadfence();
    sums = {};
#pragma unroll 4
    for (int b = static_cast<int>(threadIdx.x); b < p.partials_all; b += static_cast<int>(blockDim.x)) {
      sums.of[0] += __ldcg(p.partials + 2 * b);
      sums.of[1] += __ldcg(p.partials + 2 * b + 1);
    }
  }
  if (threadIdx.x != 0) return;
  // No row counts: 0 / 0, as in F.cross_entropy.
  const double n = !p.mean ? 1 : counted == kNotCounted ? 0 : ~counted;
  const double kd = sums.of[0] / n, ce = sums.of[1] / n;
  *p.loss = static_cast<T>(weighted(p.config.kd_weight, kd) + weighted(p.config.ce_weight, ce));
  if (p.kd) *p.kd = static_cast<T>(kd);
  if (p.ce) *p.ce = static_cast<T>(ce);
}

constexpr int most_threads(Kind kind, int held, bool doubles) {
  return kind == Kind::Lanes ? 128 : kind == Kind::Columns ? 256 : held > 0 ? 512 : doubles ? 256 : 512;
}

constexpr int fewest_blocks(Kind kind, int held, Mode mode) { return kind == Kind::Lanes && mode != Mode::General ? 4 : 1; }

template <class A, Kind kKind, int kHeld, Mode kMode, bool kTopK>
__global__ void __launch_bounds__(most_threads(kKind, kHeld, sizeof(typename A::T) == 8), fewest_blocks(kKind, kHeld, kMode))
    sort_kd_rows(const __grid_constant__ Params<typename A::T> p) {
  using T = typename A::T;
  constexpr bool kMayBeRest = kIsMixed<A> && kKind == Kind::Block && !kTopK;
  Group<kKind> group(p.log_lanes, p.cluster);
  if (group.keeps_list()) open_ticket(p);
  int counted = kNotCounted;
  if (group.blocks() > 1) cluster_barrier();  // the others' shared memory is there
  const int threads = static_cast<int>(blockDim.x);
  const int rows = kKind == Kind::Lanes ? threads >> p.log_lanes : kKind == Kind::Columns ? 32 : 1;
  if (p.reduced && group.member == 0) reinterpret_cast<Totals*>(shared_memory() + p.totals)[group.slot] = {0, 0};
  // Of the rows whose list did not fit, a block looks at as many marks as it has threads.
  const bool marked_only = kMayBeRest && p.only_overflow;
  const int chunk = marked_only ? threads : 1, thread = static_cast<int>(threadIdx.x);
  const int64_t step = p.groups;
#pragma unroll 1
  for (int64_t first = group.index(); first < p.tiles; first += step * chunk) {
    const int64_t mine = first + step * thread;
    const bool marked = marked_only && mine < p.rows && p.overflow[mine];
    if (marked_only && !__syncthreads_or(marked)) continue;
#pragma unroll 1
    for (int i = 0; i < chunk; ++i) {
      if (marked_only && !__syncthreads_or(marked && thread == i)) continue;
      const int64_t row = (first + step * i) * rows + group.slot;
      if (kKind == Kind::Block && p.overflow && !marked_only && group.member == 0) p.overflow[row] = 0;
      Row<A, kKind, kHeld, kMode, kTopK> loss(p, group, row, row < p.rows);
      loss.run(row, counted);
    }
  }
  if (p.reduced && group.keeps_list()) reduce<kMayBeRest>(p, counted, rows, group.index());
  if (kKind == Kind::Block && group.blocks() > 1) cluster_barrier();  // others may still look into this block's memory
}

// ---- Its launch

#if defined(__CUDACC__)
template <typename T>
cudaError_t launch_kernel(void (*kernel)(Params<T>), const Launch& launch, const Params<T>& p, cudaStream_t stream) {
  // Above what every launch may have, a kernel is granted the most once a device.
  if (launch.shared_bytes > kGrantedShared) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  if (launch.cluster == 1) {
    kernel<<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(p);
    return cudaGetLastError();
  }
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  config.gridDim = launch.blocks;
  config.blockDim = launch.threads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}
#else
// The blocks of a cluster as one block of all their threads.
template <typename T>
cudaError_t launch_kernel(void (*kernel)(Params<T>), const Launch& launch, Params<T> p, cudaStream_t) {
  p.cluster = 1;
  if (launch.shared_bytes > kGrantedShared)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  simt::launch("sort_kd_rows", kernel, dim3(launch.blocks / launch.cluster), dim3(launch.threads * launch.cluster),
               launch.shared_bytes, p);
  return cudaSuccess;
}
#endif

// Of rows whose two sides have one dtype X of 2 or 4 bytes.
template <typename X>
cudaError_t launch_rows(const Shape& shape, Mode mode, const Launch& launch, const Params<float>& p, cudaStream_t stream) {
  using V = Vectors<X>;
  constexpr int kMost = kValuesHeld / V::W;
  const auto run = [&](void (*kernel)(Params<float>)) { return launch_kernel(kernel, launch, p, stream); };
  const bool kd = mode == Mode::Kd;
  if (shape.kind == Kind::Block && shape.held == 0)
    return run(kd ? sort_kd_rows<V, Kind::Block, 0, Mode::Kd, false> : sort_kd_rows<V, Kind::Block, 0, Mode::KdCe, false>);
  if (shape.kind == Kind::Block) {
    if (mode == Mode::General) return run(sort_kd_rows<V, Kind::Block, kMost, Mode::General, false>);
    return run(kd ? sort_kd_rows<V, Kind::Block, kMost, Mode::Kd, false>
                  : sort_kd_rows<V, Kind::Block, kMost, Mode::KdCe, false>);
  }
  if (mode == Mode::General) return run(sort_kd_rows<V, Kind::Lanes, kMost, Mode::General, false>);
  if (shape.held == 1)
    return run(kd ? sort_kd_rows<V, Kind::Lanes, 1, Mode::Kd, false> : sort_kd_rows<V, Kind::Lanes, 1, Mode::KdCe, false>);
  if (shape.held == 4)
    return run(kd ? sort_kd_rows<V, Kind::Lanes, 4, Mode::Kd, false> : sort_kd_rows<V, Kind::Lanes, 4, Mode::KdCe, false>);
  return run(kd ? sort_kd_rows<V, Kind::Lanes, kMost, Mode::Kd, false>
                : sort_kd_rows<V, Kind::Lanes, kMost, Mode::KdCe, false>);
}

}  // namespace cuda
}  // namespace sortkd
