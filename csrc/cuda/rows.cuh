// The kernel of the rows of row.cuh: which of them a block takes, in the launch of all rows and in that of large ranks.
#pragma once

#include "launch.cuh"
#include "row.cuh"

namespace sortkd {
namespace cuda {

// Blocks a processor, which limits registers.
constexpr int least_blocks(Kind kind, Mode mode) {
  if (mode == Mode::General || kind == Kind::Block) return 1;
  return kind == Kind::Lanes ? 3 : 2;
}

template <class A, Kind kKind, int kHeld, Mode kMode, Lists kLists>
__global__ void __launch_bounds__(kLists == Lists::ByValue ? kTableBlock : most_threads(kKind, kMode),
                                  least_blocks(kKind, kMode)) sort_kd_rows(const __grid_constant__ Params<typename A::T> p) {
  using T = typename A::T;
  constexpr bool kByValue = kLists == Lists::ByValue, kRest = kLists == Lists::Long || kByValue;
  if (kRest || !p.counts) wait_for_launch_before();  // or the launch that counts has waited
  if (kRest && *static_cast<volatile unsigned long long*>(p.overflowed) != p.nonce) return;
  Group<kKind> group(p.log_lanes, 1, value_bytes(kKind, kMode));
  Ticket<T>(p).open();
  const int threads = static_cast<int>(blockDim.x);
  const int rows = kKind == Kind::Lanes ? threads >> p.log_lanes : kKind == Kind::Columns ? 32 : 1;
  if (p.reduced && group.member == 0) totals_of(p, group.slot) = {0, 0};
  RowCount<T> rows_that_count(p);
  rows_that_count.count();
  const T count = p.mean ? static_cast<T>(rows_that_count.of_all()) : T(1);
  const int thread = static_cast<int>(threadIdx.x);
  const auto take = [&](int64_t row, int expected) {
    Row<A, kKind, kHeld, kMode, kLists> loss(p, group, row, row < p.rows, expected);
    loss.run(row, count);
  };
  if constexpr (kRest) {
    // Each block looks at the marks of all rows, so that every one has as many of those marked as another: where few are, the
    // block with most of them decides. First rows whose list fits into shared memory, then, in blocks that have device memory,
    // the others; by value, each block has that.
    unsigned* const marks = reinterpret_cast<unsigned*>(shared_memory() + p.merging);
    const auto entries_of = [&](int64_t row) { return row < p.rows ? p.overflow[row] : 0; };
#pragma unroll 1
    for (int pass = 0; pass < (kByValue ? 1 : 2); ++pass) {
      const int step = pass == 0 ? p.groups : p.long_blocks;
      int own = group.index();  // of the marked rows that follow, this one is the block's
      if (own >= step) break;
      int entries = entries_of(thread);
#pragma unroll 1
      for (int64_t first = 0; first < p.rows; first += threads) {
        const bool marked = entries > 0 && (kByValue || (entries > p.list.long_room) == (pass == 1));
        entries = entries_of(first + threads + thread);
        const unsigned votes = __ballot_sync(kFullMask, marked);
        if (!__syncthreads_or(marked)) continue;
        if (lane_id() == 0) marks[thread / 32] = votes;
        __syncthreads();
#pragma unroll 1
        for (int warp = 0; warp < threads / 32; ++warp) {
          const int some = __popc(marks[warp]);
#pragma unroll 1
          for (; own < some; own += step) {
            unsigned left = marks[warp];
            for (int i = 0; i < own; ++i) left &= left - 1;
            const int64_t row = first + warp * 32 + __ffs(static_cast<int>(left)) - 1;
            take(row, p.overflow[row]);
          }
          own -= some;
        }
      }
    }
  } else {
#pragma unroll 1
    for (int64_t tile = group.index(); tile < p.tiles; tile += p.groups) {
      const int64_t row = tile * rows + group.slot;
      if (kKind == Kind::Block && p.overflow && group.member == 0) p.overflow[row] = 0;
      take(row, kLists == Lists::TopK ? p.k + 1 : p.C - 1);
    }
  }
  if (!p.reduced) return;
  __syncthreads();
  if (thread < static_cast<int>(kWarp)) reduce(p, rows, group.index());
}

// The kernel of a mode that is not general.
template <class A, Kind kKind, int kHeld, Lists kLists>
auto kd_rows(Mode mode) {
  return mode == Mode::Kd ? sort_kd_rows<A, kKind, kHeld, Mode::Kd, kLists> : sort_kd_rows<A, kKind, kHeld, Mode::KdCe, kLists>;
}

}  // namespace cuda
}  // namespace sortkd
