// What is over all rows: how many count, and the sums of their losses.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

// Where each block counts the rows itself: those of this thread that count.
template <typename T>
SORTKD_DEVICE int labels_of_thread(const Params<T>& p) {
  int n = 0;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int rows = p.counts ? 0 : static_cast<int>(p.rows);
#pragma unroll 1
  for (int first = thread; first < rows; first += 4 * threads)
#pragma unroll
    for (int row = first; row < first + 4 * threads; row += threads)
      if (row < rows) n += p.target[row] != p.config.ignore_index;
  return n;
}

// The rows that count, in every thread: counted by each block itself, of which this thread has `n`, or by a launch before.
// The first thread leaves them in shared memory for the end.
template <typename T>
SORTKD_DEVICE int counted_rows(const Params<T>& p, int n) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (p.counts) {
    wait_for_launch_before();
#pragma unroll 1
    for (int b = thread; b < p.count_blocks; b += threads) n += static_cast<int>(p.counts[b]);
  }
  n = block_merged(Sums<int, 1>{n}, shared_memory() + p.merging).of[0];
  if (thread == 0) *reinterpret_cast<int*>(shared_memory() + p.counted) = n;
  return n;
}

// The sum over a call's rows: each block writes its own, and the block of a launch that ends last adds them up, those of
// the launches before too, in the order of the blocks and in double. The ticket needs no launch to clear it: it begins as
// whatever memory holds, and counts from the first block that puts the call's own number into it.
template <typename T>
SORTKD_DEVICE void open_ticket(const Params<T>& p) {
  if (!p.ticket || threadIdx.x != 0) return;
  const unsigned long long seen = *static_cast<volatile unsigned long long*>(p.ticket);
  // Where this fails, another block has done it.
  if (seen >> kTicketBits != p.nonce) atomicCAS(p.ticket, seen, p.nonce << kTicketBits);
}

// A block's sums, kept in shared memory by the first thread of each of the `slots` rows that it works on at a time.
template <typename T>
SORTKD_DEVICE Totals& totals_of(const Params<T>& p, int slot) {
  return reinterpret_cast<Totals*>(shared_memory() + p.totals)[slot];
}

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

template <typename T>
SORTKD_DEVICE void reduce(const Params<T>& p, int slots, int index) {
  __syncthreads();
  Sums<double, 2> sums{};
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (thread < slots) sums = {totals_of(p, thread).kd, totals_of(p, thread).ce};
#pragma unroll 1
  for (bool own = true;; own = false) {  // the block's own rows, then the blocks
    sums = block_merged(sums, shared_memory() + p.merging);
    if (!own) break;
    bool last = false;
    if (thread == 0) {
      double* const mine = p.partials + 2 * (p.partials_before + index);
      mine[0] = sums.of[0], mine[1] = sums.of[1];
      __threadfence();
      if (p.ticket) {
        const unsigned long long before = atomicAdd(p.ticket, 1ull);
        last = (before & ((1ull << kTicketBits) - 1)) == static_cast<unsigned>(p.groups - 1);
        if (last) *p.ticket = 0;  // a graph may be replayed
        if (last && p.long_blocks) *p.overflowed = 0;
      }
    }
    if (!__syncthreads_or(last)) return;
    __threadfence();
    sums = {};
#pragma unroll 1
    for (int first = thread; first < p.partials_all; first += 4 * threads)
#pragma unroll
      for (int b = first; b < first + 4 * threads; b += threads)
        if (b < p.partials_all) sums.merge({__ldcg(p.partials + 2 * b), __ldcg(p.partials + 2 * b + 1)});
  }
  if (thread != 0) return;
  // Where no row counts: 0 / 0, as in F.cross_entropy.
  const T n = p.mean ? static_cast<T>(*reinterpret_cast<const int*>(shared_memory() + p.counted)) : T(1);
  const T kd = static_cast<T>(sums.of[0]) / n, ce = static_cast<T>(sums.of[1]) / n;
  *p.loss = weighted(p.kd_weight, kd) + weighted(p.ce_weight, ce);
  if (p.kd) *p.kd = kd;
  if (p.ce) *p.ce = ce;
}

}  // namespace cuda
}  // namespace sortkd
