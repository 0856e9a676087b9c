// The small kernels around the rows: how many count, and the sums of their losses. Sums run in a fixed order, in double
// as on the CPU, so that repeated runs agree bit for bit.
#pragma once

#include "group.cuh"
#include "sums.cuh"

namespace sortkd {
namespace cuda {

constexpr int kReduceThreads = 256;

// The rows of block `b` of `blocks`: [begin, end).
struct Span {
  int64_t begin, end;
  __device__ __forceinline__ Span(int64_t rows) {
    const int64_t span = (rows + gridDim.x - 1) / gridDim.x;
    begin = min(rows, blockIdx.x * span);
    end = min(rows, begin + span);
  }
};

// counts[b]: the rows of block b that count. No row has been left to a later launch yet.
__global__ void __launch_bounds__(kReduceThreads)
    sort_kd_count(const int64_t* target, int64_t rows, int64_t ignore_index, unsigned* counts, unsigned* left_count) {
  Group group = Group::of(kReduceThreads, 1);
  const Span span(rows);
  Count count{0};
  for (int64_t n = span.begin + threadIdx.x; n < span.end; n += kReduceThreads) count.n += target[n] != ignore_index;
  count = group.merged(count);
  if (threadIdx.x == 0) {
    counts[blockIdx.x] = static_cast<unsigned>(count.n);
    if (blockIdx.x == 0) *left_count = 0;
  }
}

// Sums of kd and, where there is one, ce over a block's span of rows.
template <typename T>
__device__ __forceinline__ Sums<double, 2> summed(Group& group, const T* kd, const T* ce, int64_t rows) {
  const Span span(rows);
  Sums<double, 2> sums{};
  for (int64_t n = span.begin + threadIdx.x; n < span.end; n += kReduceThreads) {
    sums.of[0] += static_cast<double>(kd[n]);
    if (ce) sums.of[1] += static_cast<double>(ce[n]);
  }
  return group.merged(sums);
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    sort_kd_sum(const T* kd, const T* ce, int64_t rows, double* kd_sums, double* ce_sums) {
  Group group = Group::of(kReduceThreads, 1);
  const Sums<double, 2> sums = summed(group, kd, ce, rows);
  if (threadIdx.x != 0) return;
  kd_sums[blockIdx.x] = sums.of[0];
  ce_sums[blockIdx.x] = sums.of[1];
}

// The results of a call from its rows, or from the sums over spans of them; one block. `counts`: for a mean.
template <typename T, typename Out>
__global__ void __launch_bounds__(kReduceThreads)
    sort_kd_reduce(const T* kd_rows, const T* ce_rows, int64_t rows, const unsigned* counts, int count_blocks,
                   double kd_weight, double ce_weight, Out* loss, Out* kd, Out* ce) {
  Group group = Group::of(kReduceThreads, 1);
  Sums<double, 2> sums = summed(group, kd_rows, ce_rows, rows);
  if (counts) {
    // No row counts: 0 / 0, as in F.cross_entropy.
    const double n = counted_rows(counts, count_blocks);
    sums.of[0] /= n;
    sums.of[1] /= n;
  }
  if (threadIdx.x != 0) return;
  double total = kd_weight * sums.of[0];
  if (ce_weight != 0) total += ce_weight * sums.of[1];
  *loss = static_cast<Out>(total);
  if (kd) *kd = static_cast<Out>(sums.of[0]);
  if (ce) *ce = static_cast<Out>(sums.of[1]);
}

}  // namespace cuda
}  // namespace sortkd
