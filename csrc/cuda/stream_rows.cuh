// The loss and gradient of rows that do not fit in registers, of rows whose label ranks low, and of top-k teachers: a
// block a row.
//
// A row streams by twice: for its sums and the classes above its label, and for its gradient (and once before, for its
// deviation). The classes above the label stay out of the first pass and join the sums in order and corrected, so
// nothing is ever subtracted from a sum.
#pragma once

#include "choices.h"
#include "dense.cuh"
#include "online.cuh"
#include "order.cuh"

namespace sortkd {
namespace cuda {

// The classes of a thread at its k-th vector, unpacked; the edges come after the last vector. -infinity where there is
// none.
template <typename Access>
struct Classes {
  using T = typename Access::T;
  static constexpr int kWidth = Access::kWidth;
  T s[kWidth], t[kWidth];
  bool edge;

  __device__ __forceinline__ Classes(const Access& access, int k) : edge(Access::kEdges && k == access.steps) {
    if (edge) {
      const int c = access.edge_class();
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        s[i] = i == 0 && c != kNotHeld ? access.student_one(c) : -kInfinity<T>;
        t[i] = i == 0 && c != kNotHeld ? access.teacher_one(c) : -kInfinity<T>;
      }
      return;
    }
    const auto student = access.student_at(k), teacher = access.teacher_at(k);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      s[i] = student.get(i);
      t[i] = teacher.get(i);
    }
  }

  // Steps over a row, the one for the edges included: the same for all threads.
  static __device__ __forceinline__ int steps(const Access& access) { return access.steps + (access.edges > 0); }

  __device__ __forceinline__ int class_of(const Access& access, int k, int i) const {
    return edge ? (i == 0 ? access.edge_class() : kNotHeld) : access.class_of(k, i);
  }
  __device__ __forceinline__ bool holds(const Access& access, int k, int i) const {
    return edge ? i == 0 && access.edge_class() != kNotHeld : access.holds(k, i);
  }
};

// Mean and unbiased deviation of both sides, by Chan's update from vector to vector, relative to the label's logits.
template <typename Access, typename T>
__device__ __forceinline__ void spread_of_row(const Access& access, Group& group, T student_label, T teacher_label,
                                              Spread<T>& of_student, Spread<T>& of_teacher) {
  constexpr int kWidth = Access::kWidth;
  T seen = 0, mean[2] = {}, squares[2] = {};
  for (int k = 0; k < Classes<Access>::steps(access); ++k) {
    const Classes<Access> classes(access, k);
    int held = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) held += classes.holds(access, k, i);
    if (held == 0) continue;
    const T n = static_cast<T>(held), share = n / (seen + n);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const T* x = side ? classes.t : classes.s;
      const T label = side ? teacher_label : student_label;
      T sum = 0, centred = 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += classes.holds(access, k, i) ? x[i] - label : T(0);
      const T own = sum / n, step = own - mean[side];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const T d = classes.holds(access, k, i) ? x[i] - label - own : T(0);
        centred += d * d;
      }
      squares[side] += centred + step * step * seen * share;
      mean[side] += step * share;
    }
    seen += n;
  }
  Sums<T, 2> sums{{mean[0] * seen, mean[1] * seen}};
  sums = group.merged(sums);
  const T n = static_cast<T>(access.C);
  const T all[2] = {sums.of[0] / n, sums.of[1] / n};
  Sums<T, 2> total{};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const T apart = mean[side] - all[side];
    total.of[side] = squares[side] + seen * apart * apart;
  }
  total = group.merged(total);
  const T freedom = static_cast<T>(max(access.C - 1, 1));
  of_student = {student_label + all[0], sqrt(total.of[0] / freedom)};
  of_teacher = {teacher_label + all[1], sqrt(total.of[1] / freedom)};
}

// The classes above a label, in order, as the correction leaves them: each with the value of the next, the last one
// with the label's; of a swap only the first moves.
template <typename T>
struct Above {
  const Entry<T>* entries;
  int n;
  Correction correction;
  T label_value;

  __device__ __forceinline__ T corrected(int i) const {
    if (correction == Correction::Swap) return i == 0 ? label_value : entries[i].value();
    return i + 1 < n ? entries[i + 1].value() : label_value;
  }
};

template <typename Access, Passes kPasses>
__device__ __forceinline__ void stream_row(const LossParams<typename Access::T>& p, Group& group, int64_t row) {
  using T = typename Access::T;
  using RowClasses = Classes<Access>;
  constexpr int kWidth = Access::kWidth;
  constexpr bool general = kPasses == Passes::General;
  const RowHead<T> head = read_head(p, row);
  if (!Access::kEdges && p.teacher_indices && head.counts) densify(p, row, group);
  const Access access(p, head, group);
  int* const count = reinterpret_cast<int*>(group.shared + kGroupBytes);
  Entry<T>* const shared = reinterpret_cast<Entry<T>*>(group.shared + kGroupBytes + kCounterBytes);
  Entry<T>* const entries = reinterpret_cast<Entry<T>*>(p.entries + blockIdx.x * p.entry_bytes);

  Online<kPasses, T> online{};
  Spread<T> of_student{}, of_teacher{};
  T student_label = 0, teacher_label = 0;
  Above<T> above{shared, 0, p.correction, 0};
  Count rank{0};
  if (group.member == 0) *count = 0;
  __syncthreads();
  if (head.counts) {
    student_label = access.student_one(head.label);
    teacher_label = above.label_value = access.teacher_one(head.label);
    if (general && p.standardize)
      spread_of_row(access, group, student_label, teacher_label, of_student, of_teacher);
    online.x = exponents_of<general>(p, head.temperature, of_student.deviation, of_teacher.deviation);

    for (int k = 0; k < RowClasses::steps(access); ++k) {
      RowClasses classes(access, k);
      unsigned hits = 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const bool hit = classes.t[i] > above.label_value;
        hits |= static_cast<unsigned>(hit) << i;
      }
      rank.n += __popc(hits);
      if (p.correction == Correction::None) hits = 0;
      if (__any_sync(kFullMask, hits != 0)) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          append(entries, count, hits >> i & 1, classes.t[i], classes.class_of(access, k, i));
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (hits >> i & 1 || classes.class_of(access, k, i) == head.label)
          classes.s[i] = classes.t[i] = -kInfinity<T>;
      online.add(p.with_ce, classes.s, classes.t);
    }
    rank = group.merged(rank);
    __syncthreads();
    above.n = *count;
  }
  if (above.n > 0) {
    // A swap wants to know the first alone, but sums want an order that is the same from run to run.
    above.entries = put_in_order(entries, entries + p.C, shared, p.shared_entries, above.n);
    teacher_label = above.entries[0].value();
    for (int i = group.member; i < above.n; i += group.size) {
      const T s[1] = {access.student_one(above.entries[i].c())}, t[1] = {above.corrected(i)};
      online.add(p.with_ce, s, t);
    }
  }
  online.rebase(group.merged(online.at));
  online.sums = group.merged(online.sums);
  const Exponents<T>& x = online.x;
  const Coefficients<T> c = finish_row<general>(p, head, row_sums(online.sums, x, student_label, teacher_label), x,
                                                of_student, student_label, rank.n, group.member == 0);
  if (!p.grad_student) return;
  const auto gradient = [&](T s, T t) {
    return head.counts ? gradient_of<kPasses>(c, x, p.with_ce, p.standardize, s, t) : T(0);
  };
  // These first, since the gradient may take the student's place; the pass below leaves them alone.
  for (int i = group.member; i < above.n; i += group.size) {
    const int place = above.entries[i].c();
    access.store_one(place, gradient(access.student_one(place), above.corrected(i)));
  }
  for (int k = 0; k < RowClasses::steps(access); ++k) {
    const RowClasses classes(access, k);
    unsigned stored = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      stored |= static_cast<unsigned>(above.n == 0 || !(classes.t[i] > above.label_value)) << i;
    Vector<typename Access::X> g;
    g.assign([&](int i) {
      const bool label = head.counts && classes.class_of(access, k, i) == head.label;
      return label ? c.at_label : gradient(classes.s[i], classes.t[i]);
    });
    if (!classes.edge && stored == (1u << kWidth) - 1) {
      access.store_at(k, g);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (classes.holds(access, k, i) && stored >> i & 1) access.store_one(classes.class_of(access, k, i), g.get(i));
    }
  }
}

// All rows, or those that sort_kd_tile left, in whatever order they come in.
template <typename Access, bool general>
__global__ void __launch_bounds__(most_stream_threads(sizeof(typename Access::T) == 8), 1)
    sort_kd_stream(const __grid_constant__ LossParams<typename Access::T> p) {
  Group group = Group::of(static_cast<int>(blockDim.x), 1);
  const int64_t rows = p.left_count ? *p.left_count : p.rows;
  with_passes<general>(p.passes, [&](auto passes) {
    for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
      stream_row<Access, decltype(passes)::value>(p, group, p.left ? p.left[i] : i);
      __syncthreads();  // the next row takes this one's shared and scratch memory
    }
  });
}

}  // namespace cuda
}  // namespace sortkd
