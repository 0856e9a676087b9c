// The correction of rows of lanes with more classes above their label than a near list has room for: these classes get their
// corrected logits in shared memory, where the row lies, and the row goes on as one whose teacher is right.
#pragma once

#include "list.cuh"

namespace sortkd {
namespace cuda {

// Where value `at` of the sorted ones lies. Lanes then read from different banks of shared memory both when each reads eight
// neighbouring values in turn and when the lanes of a warp read neighbours.
SORTKD_DEVICE int swizzled(int at) { return at ^ (at >> 5 & 7) ^ (at >> 6 & 3) << 3; }

// Sorts a row's n values, the largest first, by a bitonic network whose comparisons all put the larger value first. A thread
// takes up to three steps of the network at a time, over eight values in registers. `values` has room for a power of two above
// n, and for eight.
SORTKD_DEVICE void sort_values(float* values, int n, const Group<Kind::Lanes>& group) {
  const auto exchange = [](float& first, float& second) {
    const float a = first, b = second;
    first = fmaxf(a, b), second = fminf(a, b);
  };
  // Behind the values -infinity, which never moves.
#pragma unroll 1
  for (int at = n + group.member; at < max(8, 1 << (32 - __clz(n))); at += group.size) values[swizzled(at)] = -kInfinity<float>;
  __syncwarp();
  // Runs of so many values are in order, at first of one. Eight neighbours are put in order; then runs are merged two by two:
  // the first step compares the first run with the second one read backwards, each step after it values at half the distance.
#pragma unroll 1
  for (int run = 1; group.any(run < n); run *= run == 1 ? 8 : 2) {
    const int end = run < n ? n : 0;  // or only other rows of the warp have more
    int steps = run == 1 ? 3 : (31 - __clz(run)) % 3 + 1;
#pragma unroll 1
    for (int distance = run == 1 ? 4 : run; distance >= 1; distance >>= steps, steps = 3) {
      const int apart = distance / 4;  // of a thread's values: four of either half
      const bool backwards = distance == run;
#pragma unroll 1
      for (int i = group.member, first; (first = (i & (apart - 1)) + (i & -apart) * 8) < end; i += group.size) {
        const int other = first + (backwards ? apart - 1 - 2 * (i & (apart - 1)) : 0);
        const auto at = [&](int k) { return (k < 4 ? first : other) + k * apart; };
        float own[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) own[k] = values[swizzled(at(k))];
        if (run == 1) {
#pragma unroll 1
          for (int twice = 0; twice < 4; ++twice) {
#pragma unroll
            for (int k = 0; k < 8; k += 2) exchange(own[k], own[k + 1]);
#pragma unroll
            for (int k = 1; k < 7; k += 2) exchange(own[k], own[k + 1]);
          }
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) backwards ? exchange(own[k], own[7 - k]) : exchange(own[k], own[4 + k]);
          if (steps > 1) {
#pragma unroll
            for (int k : {0, 1, 4, 5}) exchange(own[k], own[k + 2]);
          }
          if (steps > 2) {
#pragma unroll
            for (int k = 0; k < 8; k += 2) exchange(own[k], own[k + 1]);
          }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) values[swizzled(at(k))] = own[k];
      }
      __syncwarp();
    }
  }
}

// The correction of a row of lanes. A thread has the classes class_of(n), in order, of the bits n of `higher`, and before them
// other threads have `before`; the row has n_above. `logit(n)` is the teacher's logit of a class, and becomes the corrected
// one. `values` has room for a float of each class, `last` for a number of every other one. values[0] becomes the label's
// logit.
template <typename F, typename G>
SORTKD_DEVICE void rotate_top(const Group<Kind::Lanes>& group, Correction correction, float label, unsigned higher, int before,
                              int n_above, float* values, unsigned short* last, F&& logit, G&& class_of) {
  using X = std::remove_reference_t<decltype(logit(0))>;
  const auto each = [](unsigned bits, auto&& f) {
#pragma unroll 1
    for (; bits; bits &= bits - 1) f(__ffs(static_cast<int>(bits)) - 1);
  };
  float top = label;
  __syncwarp();  // `values` may lie where other lanes have loaded the student's logits from
  if (correction == Correction::Sort) {
    each(higher, [&](int n) { values[swizzled(before++)] = widened(logit(n)); });
    sort_values(values, n_above, group);
    // Of classes with one value the last one takes the next lower value; the others keep theirs.
    const auto below = [&](int at) { return narrowed<X>(at < n_above ? values[swizzled(at)] : label); };
    const auto note = [&](int n) -> unsigned short& { return reinterpret_cast<unsigned short&>(logit(n)); };
    unsigned tied = 0;
    each(higher, [&](int n) {
      const float value = widened(logit(n));
      int at = 0;  // values that are not lower
#pragma unroll 1
      for (int step = 1 << (31 - __clz(n_above)); step >= 1; step /= 2)
        if (at + step <= n_above && values[swizzled(at + step - 1)] >= value) at += step;
      if (at >= 2 && values[swizzled(at - 2)] == value)
        tied |= 1u << n, note(n) = static_cast<unsigned short>(at);
      else
        logit(n) = below(at);
    });
    if (__any_sync(kFullMask, tied)) {
      // The last class of each tie. A tie ends behind its last value; halves of these ends differ, as it has two values or
      // more.
#pragma unroll 1
      for (int i = group.member; i <= n_above / 2; i += group.size) last[i] = 0;
      __syncwarp();
      each(tied, [&](int n) {
        unsigned short* const place = last + note(n) / 2;
        const auto c = static_cast<unsigned short>(class_of(n));
#pragma unroll 1
        for (unsigned short seen = *place; seen < c;) {
          const unsigned short before = atomicCAS(place, seen, c);
          if (before == seen) break;
          seen = before;
        }
      });
      __syncwarp();
      each(tied, [&](int n) {
        const int at = note(n);
        logit(n) = last[at / 2] == class_of(n) ? below(at) : narrowed<X>(values[swizzled(at - 1)]);
      });
    }
    if (n_above > 0) top = values[0];
  } else if (correction == Correction::Swap) {
    auto first = Entry<float>::none();
    each(higher, [&](int n) {
      const auto entry = Entry<float>::of(widened(logit(n)), class_of(n));
      if (entry.before(first)) first = entry;
    });
#pragma unroll 1
    for (int offset = group.size / 2; offset >= 1; offset /= 2) {
      const Entry<float> other{__shfl_xor_sync(kFullMask, first.word, offset)};
      if (other.before(first)) first = other;
    }
    each(higher, [&](int n) {
      if (class_of(n) == first.c()) logit(n) = narrowed<X>(label);
    });
    if (n_above > 0) top = first.value();
  }
  __syncwarp();
  if (group.member == 0) values[0] = top;
  __syncwarp();
}

}  // namespace cuda
}  // namespace sortkd
