// Rows that are read from memory twice, those of two dtypes, and columns: one pass that takes the exponentials and their
// sums, one that writes the gradient. Lanes and columns hold what they have read; the others read it again.
//
// A pass is plain KD. The label's slot counts as -infinity in it, and so does each class above the label, which is put
// on a list instead; trained teachers have few. The list's classes join the sums with their corrected values, and their
// gradients, as the label's, go over the row's. So nothing is subtracted from a sum, and no correction slows the pass.
// Rows with too many of them for a list have a launch of their own, in which these classes take their corrected logits as
// they are read.
//
// Exponentials are relative to the label's own logits, which takes no search for maxima. Where a sum then leaves the
// range of its type the row is done again, relative to its maxima.
#pragma once

#include "access.cuh"
#include "general.cuh"
#include "reduce.cuh"
#include "value_table.cuh"

namespace sortkd {
namespace cuda {

template <class A, Kind kKind, int kHeld, Mode kMode, Lists kLists>
struct Row {
  using T = typename A::T;
  static constexpr int W = A::W;
  static constexpr bool kGeneral = kMode == Mode::General, kTopK = kLists == Lists::TopK, kLong = kLists == Lists::Long,
                        kByValue = kLists == Lists::ByValue, kMoves = kLong || kByValue;
  using S = std::conditional_t<kGeneral, double, T>;
  static constexpr int kSums = kGeneral ? kGeneralSums : kMode == Mode::KdCe ? 4 : 3;
  static constexpr T kLowest = -kInfinity<T>;
  static constexpr T kBits = static_cast<T>(kLog2e);

  const Params<T>& p;
  Group<kKind>& group;
  List<T, kKind, kLong || (kIsMixed<A> && (kTopK || std::is_same_v<T, double>))> list;
  ValueTable<typename LogitOf<A>::Type> table;  // in place of the list, by value

  A access;
  bool here, counts;
  int y, label_vector, live;  // live: vectors to read
  T student_label, teacher_label, threshold;
  int listed, above;  // entries on the list, and those of them above the label
  Exponent<T, kMode> of_student, of_teacher;
  T ce_reference;

  // `expected`: the most classes that are above the label; in the launch for long lists so many are.
  SORTKD_DEVICE Row(const Params<T>& p, Group<kKind>& group, int64_t row, bool here, int expected)
      : p(p),
        group(group),
        list(p.list, group, expected),
        table(p.list),
        access(p, here ? row : 0),
        here(here),
        above(expected) {}

  SORTKD_DEVICE int class_of(int g, int i) const { return g * W + i - access.head; }

  // Vectors of a thread that are under way at a time. The general kernel has registers for half as many, with long lists
  // for one.
  static constexpr int kRaw = kHeld > 0 ? kHeld : kMoves ? 1 : kGeneral ? (A::kAhead + 1) / 2 : A::kAhead;
  // f(g, j): vector g of the thread, in raw_s[j] and raw_t[j]; then(first) after every kRaw of them.
  template <typename R, typename Q, typename F, typename G>
  SORTKD_DEVICE void each(int end, R* raw_s, Q* raw_t, F&& f, G&& then) const {
    if constexpr (kHeld > 0) {
      const int first = compiler_barrier(group.member);  // the places are not kept from pass to pass
#pragma unroll
      for (int j = 0; j < kHeld; ++j) f(first + group.size * j, j);
    } else {
#pragma unroll 1
      for (int first = group.member; first < end; first += group.size * kRaw) {
#pragma unroll
        for (int j = 0; j < kRaw; ++j) access.fetch(min(first + group.size * j, access.count - 1), raw_s[j], raw_t[j]);
#pragma unroll
        for (int j = 0; j < kRaw; ++j) f(first + group.size * j, j);
        then(first);
      }
    }
  }
  // f(s, t) for each class but the label.
  template <typename F>
  SORTKD_DEVICE void each_other(F&& f) const {
#pragma unroll 1
    for (int g = group.member; g < live; g += group.size) {
      typename A::Raw raw_s;
      typename A::RawTeacher raw_t;
      T s[W], t[W];
      access.fetch(g, raw_s, raw_t);
      access.unpacked(raw_s, raw_t, s, t);
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (is_other(class_of(g, i))) f(s[i], t[i]);
    }
  }
  SORTKD_DEVICE bool in_row(int c) const { return static_cast<unsigned>(c) < static_cast<unsigned>(p.C); }
  SORTKD_DEVICE bool is_other(int c) const { return counts && in_row(c) && c != y; }
  // Of a top-k teacher: a bit for each class that is not as the absent are.
  SORTKD_DEVICE unsigned* present() const { return reinterpret_cast<unsigned*>(shared_memory() + p.list.present); }
  SORTKD_DEVICE bool is_present(int c) const { return kTopK && (present()[c / 32] >> (c % 32) & 1); }
  SORTKD_DEVICE void set_present(int c) const { atomicOr(present() + c / 32, 1u << (c % 32)); }
  // Numbers that one thread of a block has for all.
  SORTKD_DEVICE T* notes() const { return reinterpret_cast<T*>(shared_memory() + p.list.notes); }

  // The teacher's logit, which is `t` in memory, as it joins the sums: of the launch for long lists the corrected one.
  SORTKD_DEVICE T corrected(T t, int c) const {
    if constexpr (kMoves)
      if (t > threshold && in_row(c)) {  // a vector may have classes of other rows, too
        if constexpr (kByValue)
          return table.corrected(t, c);
        else
          return moved()[c];
      }
    return t;
  }
  SORTKD_DEVICE float* moved() const { return p.list.moved + static_cast<int64_t>(blockIdx.x) * p.C; }
  // Prepares what corrected() looks up. Returns the label's corrected logit.
  SORTKD_DEVICE T move_classes() {
    if constexpr (kByValue) {
      table.build(group, p.config.correction, teacher_label, [&](auto&& f) { each_above(f); });
      return table.top;
    } else {
      list.collect(group, counts ? p.C : 0, threshold, [&](int c) { return access.teacher(c); });
      list.put_in_order(above, true);
#pragma unroll 1
      for (int at = group.member; at < above; at += group.size)
        moved()[list[at].c()] = list.corrected(at, p.config.correction, above, teacher_label);
      __syncthreads();
      return list[0].value();
    }
  }
  // f(t, c) for each class above the label, of a row of vectors: the next one on its way.
  template <typename F>
  SORTKD_DEVICE void each_above(F&& f) const {
    const auto load = [&](int g) { return *access.teacher4(min(g, access.count - 1)); };
    uint4 next = load(group.member);
#pragma unroll 1
    for (int g = group.member; g < live; g += group.size) {
      T t[W];
      unpack<typename LogitOf<A>::Type>(next, t);
      next = load(g + group.size);
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (t[i] > threshold && in_row(class_of(g, i))) f(t[i], class_of(g, i));
    }
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
      const int64_t index = indices[j];
      assert(index >= 0 && index < p.C && "a teacher index is outside [0, C)");
      const int c = static_cast<int>(index);
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
      if (group.member == 0) {
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
    group.sync();
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
    student = {student_label + mean_s, deviation(squares.of[0], n)};
    teacher = {teacher_label + mean_t, deviation(squares.of[1], n)};
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
    ce_reference = reference_of(largest.student, student_label);
    of_student.relative_to(ce_reference);
    of_teacher.relative_to(reference_of(largest.teacher, teacher_label));
  }

  SORTKD_DEVICE void add_teacher(Sums<T, kSums>& sums, T u, T v, T e) const {
    sums.of[kZTeacher] += e;
    if (e != T(0)) {  // where p is 0 the class counts 0, whatever q
      sums.of[kCross] = fma(e, v - u, sums.of[kCross]);
      if constexpr (kGeneral) {
        sums.of[kMomentTeacher] = fma(e, v, sums.of[kMomentTeacher]);
        sums.of[kMomentCross] = fma(e, v * (v - u), sums.of[kMomentCross]);
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

  SORTKD_DEVICE void run(int64_t row, T count) {
    const int64_t label = here ? p.target[row] : p.config.ignore_index;
    // All loads are under way before the first is waited for. What is not of the row is read, too.
    typename A::Raw raw_s[kRaw];
    typename A::RawTeacher raw_t[kRaw];
    T temperature = p.temperature_value, inverse = p.inverse_temperature, top;
    MeanStd<T> statistics_s{}, statistics_t{};
    Sums<S, kSums> sums;
    bool to_maxima, need, centred = !p.moments;
    const auto begin = [&] {
      counts = label != p.config.ignore_index;
      assert((!counts || (label >= 0 && label < p.C)) && "a label is outside [0, C)");
      y = counts ? static_cast<int>(label) : 0;
      live = counts ? access.count : 0;
      label_vector = static_cast<int>(static_cast<unsigned>(y + access.head) / W);
      student_label = counts ? access.student(y) : T(0);
      listed = 0;
      if constexpr (!kMoves) above = 0;
      if constexpr (kTopK)
        list_top_k(row);
      else
        teacher_label = counts ? access.teacher(y) : T(0);
      threshold = teacher_label + p.over_label;
      top = teacher_label;
      if constexpr (kMoves) top = move_classes();

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
      ce_reference = student_label;
      of_student.relative_to(student_label);
      of_teacher.relative_to(teacher_label);
      if (kGeneral && p.config.standardize) {
        // Near what the moments are taken about, and never above the largest.
        if (fabs(statistics_s.mean) < kInfinity<T>) of_student.relative_to(statistics_s.mean);
        if (fabs(statistics_t.mean) < kInfinity<T>) of_teacher.relative_to(statistics_t.mean);
        centred = true;
      }

      const bool finite = fabs(student_label) < kInfinity<T> && fabs(teacher_label) < kInfinity<T>;
      need = to_maxima = counts && !finite;
    };
    for (bool first = true;; first = false) {
      if (kHeld > 0 && first) {
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
      if (kLists == Lists::Short) {
        list.clear();
        group.sync();
      }
      sums = {};
      Sums<T, kSums> some{};
      unsigned higher = 0;  // of the values held, those to be listed: a bit each
      int turn = 0;
      const auto add = [&](int g, int j) {
        T sv[W], tv[W];
        access.unpacked(raw_s[j], raw_t[j], sv, tv);
        // What is not of the row, the label, and what is on the list adds nothing.
        T largest = tv[0];
#pragma unroll
        for (int i = 1; i < W; ++i) largest = max(largest, tv[i]);
        if constexpr (W == 1 && !kTopK && !kMoves) {  // with no branch
          const bool other = g < live && g != label_vector, high = other && largest > threshold;
          *sv = other ? *sv : kLowest;
          *tv = other && !high ? *tv : kLowest;
          higher |= high ? 1u << j : 0;
        } else if (!access.inner(g) || !counts || g == label_vector || (!kTopK && largest > threshold)) {
#pragma unroll
          for (int i = 0; i < W; ++i) {
            const bool other = is_other(class_of(g, i)), high = !kTopK && other && tv[i] > threshold;
            sv[i] = other ? sv[i] : kLowest;
            tv[i] = !other || (high && !kMoves) ? kLowest : corrected(tv[i], class_of(g, i));
            higher |= high ? 1u << (j * W + i) : 0;
          }
        }
        if constexpr (kTopK) {
          const unsigned there = present()[min(g, access.count - 1) * W / 32] >> (g * W % 32);
#pragma unroll
          for (int i = 0; i < W; ++i) tv[i] = there >> i & 1 ? kLowest : tv[i];
        }
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const T u = of_student(sv[i]), v = of_teacher(tv[i]);
          const T e = power_of_two(u), e_t = power_of_two(v);
          some.of[kZStudent] += e;
          add_teacher(some, u, v, e_t);
          if constexpr (kMode != Mode::Kd) some.of[kZCe] += ce_exponential(sv[i], e);
          if constexpr (kGeneral)
            if (e != T(0)) some.of[kMomentStudent] = fma(e, u, some.of[kMomentStudent]);
        }
      };
      const auto then = [&](int g) {
        if (kLists == Lists::Short) list_classes(g, higher);
        if (kGeneral && (turn += kRaw * W) >= 16) {
          add_to(sums, some);
          some = {};
          turn = 0;
        }
      };
      each(live, raw_s, raw_t, add, then);
      if constexpr (!kTopK && !kMoves) {
        if constexpr (kHeld > 0) list_classes(group.member, higher);
        group.sync();
        listed = above = *list.count();
        if (kKind == Kind::Block && listed > p.list.room) {
          if (group.member == 0) put_off(p, row, listed);
          group.sync();
          return;
        }
      }
      if (group.any(listed > 0)) {
        if (!kTopK) list.put_in_order(listed);  // also where none moves: the order of sums is fixed
#pragma unroll 1
        for (int at = group.member; at < listed; at += group.size) {
          const T u = of_student(access.student(list[at].c())),
                  v = of_teacher(list.corrected(at, p.config.correction, above, teacher_label));
          add_teacher(some, u, v, power_of_two(v));
        }
        if (above > 0) top = list[0].value();
      }
      add_to(sums, some);
      sums = group.merged(sums);
      const auto fits = [&](S z) { return well_scaled<S>(z, kMostOfKd * S(p.C)); };
      need = counts && !to_maxima &&
             !(fits(sums.of[kZStudent]) && fits(sums.of[kZTeacher]) &&
               (kSums < 4 || !p.with_ce || fits(sums.of[kZCe] * S(kMostOfKd / kMostOfCe))));
      if (group.any(need)) continue;
      if (!kGeneral || centred) break;
      centred = true;
      if constexpr (kGeneral) {
        const bool far = is_far(sums);
        if (!group.any(far)) break;
        if (!far) continue;
        const T mean_s = static_cast<T>(sums.of[kMomentStudent] / sums.of[kZStudent]) / of_student.scale;
        const T mean_t = static_cast<T>(sums.of[kMomentTeacher] / sums.of[kZTeacher]) / of_teacher.scale;
        if (fabs(mean_s) < kInfinity<T>) of_student.reference += mean_s;
        if (fabs(mean_t) < kInfinity<T>) of_teacher.reference += mean_t;
      }
    }
    finish(row, temperature, inverse, sums, top, statistics_s, count, raw_s, raw_t);
  }

  SORTKD_DEVICE void finish(int64_t row, T temperature, T inverse, const Sums<S, kSums>& sums, T top,
                            const MeanStd<T>& statistics, T count, typename A::Raw* raw_s, typename A::RawTeacher* raw_t) {
    T weight = here && p.grad_output ? p.grad_output[row * p.grad_output_stride] : T(1);
    weight /= count;
    T kd, ce;
    Coefficients<T> on{};
    if constexpr (kGeneral) {
      const GeneralRow<T> of_row{of_student, of_teacher, temperature, inverse, statistics, ce_reference};
      const T label = corrected_label(top);
      const GeneralTerms<T> terms = general_terms(p, sums, of_row, student_label, label, weight);
      kd = terms.kd, ce = terms.ce, on = terms.on;
      if (p.grad_temperature && here && group.member == 0)
        p.grad_temperature[row] =
            counts ? temperature_gradient(p, sums, of_student(student_label), of_teacher(label), temperature, weight) : T(0);
    } else {
      const KdSums r{sums.of[kZStudent],        sums.of[kZTeacher],
                     sums.of[kCross],           sums.of[kMode == Mode::KdCe ? kZCe : kZStudent],
                     of_student(student_label), of_teacher(corrected_label(top))};
      const KdTerms terms = kd_terms(p, r, weight, temperature, inverse);
      kd = terms.kd, ce = terms.ce;
      // At temperature 1 the cross-entropy has the exponentials of KD.
      on = {terms.on_student + (kMode == Mode::Kd ? terms.on_ce : 0), terms.on_teacher, terms.on_ce, terms.at_label, 0};
    }
    if (!counts) on = {}, kd = ce = T(0);
    if (here && group.member == 0) write_row(p, group.slot, row, kd, ce, rank());
    if (!p.grad) return;

    // `logit` where the mode asks for more than the exponentials.
    const auto gradient = [&](T e, T e_t, T logit) {
      T g = fma(e, on.on_student, -(e_t * on.on_teacher));
      if constexpr (kMode == Mode::KdCe) g = fma(raised(compiler_barrier(e), p.power), on.on_ce, g);
      if constexpr (kGeneral) {
        if (p.with_ce) g = fma(ce_exponential(logit, e), on.on_ce, g);
        if (p.config.standardize) g -= on.dstd * (logit - statistics.mean);
      }
      return g;
    };
    const bool fix = group.any(listed > 0);
    if (fix) {
      // While the logits are there still: the gradient may lie in their place.
      list.replace_values(listed, [&](int at) {
        const T logit = access.student(list[at].c()), value = list.corrected(at, p.config.correction, above, teacher_label);
        return gradient(power_of_two(of_student(logit)), power_of_two(of_teacher(value)), logit);
      });
      group.sync();
    }
    if constexpr (kHeld > 0) {  // nor are exponents
      of_student.offset = compiler_barrier(of_student.offset);
      of_teacher.offset = compiler_barrier(of_teacher.offset);
    }
    const int end = here && !p.scalar_grads ? access.count : 0;
    const auto write = [&](int g, int j) {
      T grads[W], sv[W], tv[W];
      access.unpacked(raw_s[j], raw_t[j], sv, tv);
#pragma unroll
      for (int i = 0; i < W; ++i)
        grads[i] = counts ? gradient(power_of_two(of_student(sv[i])),
                                     power_of_two(of_teacher(corrected(tv[i], class_of(g, i)))), sv[i])
                          : T(0);
      if (g < end && (W == 1 || access.inner(g))) access.store(g, grads);
    };
    each(access.count, raw_s, raw_t, write, [](int) {});
    if (here)
      each_edge(group, p.C, max(access.before(), p.scalar_grads), max(access.after(), p.scalar_grads), [&](int c) {
        if (counts && c == y) return;
        const T logit = access.student(c);
        access.put(c, counts ? gradient(power_of_two(of_student(logit)),
                                        power_of_two(of_teacher(corrected(access.teacher(c), c))), logit)
                             : T(0));
      });
    // By the thread that has written the label's vector, so after it.
    if (counts && group.has(label_vector)) access.put(y, on.at_label);
    if (fix) {
      group.sync();
#pragma unroll 1
      for (int at = group.member; at < listed; at += group.size) access.put(list[at].c(), list[at].number());
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

}  // namespace cuda
}  // namespace sortkd
