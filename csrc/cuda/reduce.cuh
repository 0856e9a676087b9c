// What is over all rows: how many count, and the sums of their losses.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

// Of a block, in shared memory: registers are short. The sums over a slot's rows, kept by the row's first thread.
template <typename T>
SORTKD_DEVICE Totals& totals_of(const Params<T>& p, int slot) {
  return reinterpret_cast<Totals*>(shared_memory() + p.totals)[slot];
}
// A number of each warp, and behind a barrier the block's sum of them.
template <typename T>
SORTKD_DEVICE int* merging_of(const Params<T>& p) {
  return reinterpret_cast<int*>(shared_memory() + p.merging);
}
template <typename T>
SORTKD_DEVICE void put_for_block(const Params<T>& p, int n) {
  n = warp_sum(n);
  if (lane_id() == 0) merging_of(p)[threadIdx.x / kWarp] = n;
}
template <typename T>
SORTKD_DEVICE int sum_of_block(const Params<T>& p) {
  int n = 0;
#pragma unroll 1
  for (int w = 0; w < static_cast<int>(blockDim.x / kWarp); ++w) n += merging_of(p)[w];
  return n;
}
// Behind them the rows that count, once they are known, which the first thread keeps for the end.
template <typename T>
SORTKD_DEVICE int& counted(const Params<T>& p) {
  return merging_of(p)[blockDim.x / kWarp];
}

// How many of the call's rows count. Of few rows each block counts all; of more a launch before has, by block.
template <typename T>
class RowCount {
  static constexpr int kAhead = 4;
  const Params<T>& p;
  const int rows;  // that this block counts
  int64_t labels[kAhead];
  SORTKD_DEVICE void load(int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int row = first + i * static_cast<int>(blockDim.x);
      labels[i] = row < rows ? p.target[row] : p.config.ignore_index;
    }
  }

 public:
  // The first labels leave: before those of the first row's logits, behind which they would arrive.
  SORTKD_DEVICE explicit RowCount(const Params<T>& p) : p(p), rows(p.mean && !p.counts ? static_cast<int>(p.rows) : 0) {
    load(static_cast<int>(threadIdx.x));
  }
  SORTKD_DEVICE void count() {
    int n = 0;
    const int step = kAhead * static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x);;) {
#pragma unroll
      for (const int64_t label : labels) n += label != p.config.ignore_index;
      if ((first += step) >= rows) break;
      load(first);
    }
    put_for_block(p, n);
  }
  // Of all rows, in every thread.
  SORTKD_DEVICE int of_all() const {
    if (p.counts) {
      wait_for_launch_before();
      int n = 0;
#pragma unroll 1
      for (int b = static_cast<int>(threadIdx.x); b < p.count_blocks; b += blockDim.x) n += static_cast<int>(p.counts[b]);
      put_for_block(p, n);
    }
    __syncthreads();
    const int n = sum_of_block(p);
    if (threadIdx.x == 0) counted(p) = n;
    return n;
  }
};

// The sum over a call's rows: each block writes its own, and the block of a launch that ends last adds them up, those of
// the launches before too, in the order of the blocks and in double. The ticket needs no launch to clear it: it begins as
// whatever memory holds, and counts from the first block that puts the call's own number into it.
template <typename T>
class Ticket {
  const Params<T>& p;
  unsigned long long seen = 0;

 public:
  SORTKD_DEVICE explicit Ticket(const Params<T>& p) : p(p) {
    if (p.ticket && threadIdx.x == 0) seen = *static_cast<volatile unsigned long long*>(p.ticket);
  }
  // Where this fails, another block has done it.
  SORTKD_DEVICE void open() const {
    if (p.ticket && threadIdx.x == 0 && seen >> kTicketBits != p.nonce) atomicCAS(p.ticket, seen, p.nonce << kTicketBits);
  }
};

// Leaves a row whose list has no room to the launch for long lists.
template <typename T>
SORTKD_DEVICE void put_off(const Params<T>& p, int64_t row, int listed) {
  p.overflow[row] = listed;
  *p.overflowed = p.nonce;
}

// A row's results, by one of its threads.
template <typename T>
SORTKD_DEVICE void write_row(const Params<T>& p, int slot, int64_t row, T kd, T ce, int rank) {
  if (p.reduced) {
    Totals& totals = totals_of(p, slot);
    totals.kd += static_cast<double>(kd), totals.ce += static_cast<double>(ce);
  } else {
    p.loss[row] = weighted(p.kd_weight, kd) + weighted(p.ce_weight, ce);
    if (p.kd) p.kd[row] = kd;
    if (p.ce) p.ce[row] = ce;
  }
  if (p.rank) p.rank[row] = rank;
}

// By the first warp, when the block has no more rows, of which it works on so many at a time.
template <typename T>
SORTKD_DEVICE void reduce(const Params<T>& p, int slots, int index) {
  const int lane = static_cast<int>(lane_id());
  Sums<double, 2> sums{};
#pragma unroll 1
  for (int slot = lane; slot < slots; slot += kWarp) sums.merge({totals_of(p, slot).kd, totals_of(p, slot).ce});
  sums = warp_merged(sums);
  bool last = false;
  if (lane == 0) {
    p.partials[p.partials_before + index] = {sums.of[0], sums.of[1]};
    fence_device();
    const unsigned long long before = atomicAdd(p.ticket, 1ull);
    last = (before & ((1ull << kTicketBits) - 1)) == static_cast<unsigned>(p.groups - 1);
  }
  if (!__any_sync(kFullMask, last)) return;
  fence_device();
  sums = {};
#pragma unroll 1
  for (int first = lane; first < p.partials_all; first += kPartialsAhead * kWarp) {
#pragma unroll
    for (int i = 0; i < kPartialsAhead; ++i) {
      const int b = first + i * static_cast<int>(kWarp);
      if (b < p.partials_all) sums.merge({__ldcg(&p.partials[b].kd), __ldcg(&p.partials[b].ce)});
    }
  }
  sums = warp_merged(sums);
  if (lane != 0) return;
  *p.ticket = 0;  // a graph may be replayed
  if (p.long_blocks) *p.overflowed = 0;
  // Where no row counts: 0 / 0, as in F.cross_entropy.
  const T n = p.mean ? static_cast<T>(counted(p)) : T(1);
  const T kd = static_cast<T>(sums.of[0]) / n, ce = static_cast<T>(sums.of[1]) / n;
  *p.loss = weighted(p.kd_weight, kd) + weighted(p.ce_weight, ce);
  if (p.kd) *p.kd = kd;
  if (p.ce) *p.ce = ce;
}

}  // namespace cuda
}  // namespace sortkd
