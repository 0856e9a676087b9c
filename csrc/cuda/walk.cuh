// The correction of a row in registers, where few classes stand above the label: its top rank + 1 values rotate by one.
//
// One step finds the next class in the order (value descending, class ascending) by a reduction over the row's threads.
// For the ranks of a trained teacher that is a handful; order.cuh has the method for the others.
#pragma once

#include "tile.cuh"

namespace sortkd {
namespace cuda {

template <typename T>
struct Candidate {
  T value;
  int c;
  int unused;
  __device__ __forceinline__ bool before(const Candidate& other) const {
    return value > other.value || (value == other.value && c < other.c);
  }
  __device__ __forceinline__ void merge(const Candidate& other) {
    if (other.before(*this)) *this = other;
  }
};

// What the correction makes of the label's logit, and of the largest beside it.
template <typename T>
struct Corrected {
  T label_value, largest_other;
};

// Rows of a warp take their steps together; those with `steps` 0 only keep step.
template <typename Access>
__device__ __forceinline__ Corrected<typename Access::T> walk(Tile<Access>& tile, Group& group, Correction correction,
                                                              int rank, int steps, Corrected<typename Access::T> now) {
  using T = typename Access::T;
  using Row = Tile<Access>;
  using Set = typename Row::Set;
  const T label_value = now.label_value;
  Set above;
  tile.for_slots([&](int k, int i) { above.add(k * Row::kWidth + i, tile.t[k].get(i) > label_value); });
  if (Access::kEdges) above.add(Row::kEdge, tile.t_edge > label_value);

  Set holder;  // the slot here that waits for the next value, if it is here
  for (int step = 0; __any_sync(kFullMask, step < steps); ++step) {
    Candidate<T> best{-kInfinity<T>, std::numeric_limits<int>::max(), 0};
    int best_slot = kNotHeld;
    const auto consider = [&](int slot, T value, int c) {
      const Candidate<T> candidate{value, c, 0};
      if (above.has(slot) && candidate.before(best)) best = candidate, best_slot = slot;
    };
    tile.for_vectors([&](int k) {
      if (!above.has_any(k * Row::kWidth, Row::kWidth)) return;
#pragma unroll
      for (int i = 0; i < Row::kWidth; ++i)
        consider(k * Row::kWidth + i, tile.t[k].get(i), tile.access.class_of(k, i));
    });
    if (Access::kEdges) consider(Row::kEdge, tile.t_edge, tile.access.edge_class());
    const int mine = best.c;
    best = group.merged(best);
    if (step >= steps) continue;
    if (step == 0) now.label_value = best.value;
    if (step == 1) now.largest_other = best.value;
    // A swap moves one class; its second step only finds the largest other.
    if (correction == Correction::Swap && step == 1) continue;
    tile.set_teacher(holder, best.value);
    holder = Set::of(mine == best.c ? best_slot : kNotHeld);
    above.remove(holder);
  }
  if (steps > 0) tile.set_teacher(holder, label_value);
  if (rank == 1) now.largest_other = label_value;
  return now;
}

}  // namespace cuda
}  // namespace sortkd
