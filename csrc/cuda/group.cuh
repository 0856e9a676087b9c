// The threads that work on one row: 1 to 32 lanes of a warp, or a whole block.
#pragma once

#include "device.cuh"

namespace sortkd {
namespace cuda {

// Bytes that a reduction over a block takes of shared memory: two turns, so that one barrier a reduction is enough, of
// a value for each of 32 warps.
constexpr int kPartialBytes = 64;
constexpr int kGroupBytes = 2 * 32 * kPartialBytes;

// A block's counter behind them, and the alignment of what follows.
constexpr int kCounterBytes = 16;

struct Group {
  int size;    // threads, a power of two
  int step;    // lanes from one to the next within a warp; over 1 where neighbouring lanes hold neighbouring rows
  int member;  // this thread among them
  char* shared;
  int turn;

  // A warp holds 32 / size rows, or the block one.
  static __device__ __forceinline__ Group of(int size, int step) {
    const int thread = static_cast<int>(threadIdx.x);
    return {size, step, size > 32 ? thread : thread % 32 / step % size, shared_memory(), 0};
  }

  __device__ __forceinline__ bool wide() const { return size > 32; }

  // The values of all threads merged, in a fixed order, in every thread. Every lane of the warp must come here, and
  // where the group is wide every thread of the block.
  template <typename V>
  __device__ __forceinline__ V merged(V value) {
    static_assert(sizeof(V) <= kPartialBytes);
    for (int offset = min(size, 32) * step / 2; offset >= step; offset /= 2) value.merge(shuffled_xor(value, offset));
    if (!wide()) return value;
    V* partial = reinterpret_cast<V*>(shared + turn * (kGroupBytes / 2));
    turn ^= 1;
    const int warps = size / 32;
    if (lane_id() == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = partial[lane_id() % warps];
    for (int offset = warps / 2; offset >= 1; offset /= 2) value.merge(shuffled_xor(value, offset));
    return value;
  }
};

// How many threads say so, and how much.
struct Count {
  int n;
  __device__ __forceinline__ void merge(const Count& other) { n += other.n; }
};

}  // namespace cuda
}  // namespace sortkd
