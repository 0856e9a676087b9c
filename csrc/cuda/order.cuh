// The classes above a label, put in order by a block: for ranks too large to walk one reduction at a time.
//
// Up to 32 are ordered by a warp in registers, as many as shared memory has room for there, more in runs of that size
// which are merged pairwise in device memory, each entry finding its place by binary search in the other run.
#pragma once

#include "group.cuh"

namespace sortkd {
namespace cuda {

// A class and its value, smaller where it comes first: value descending, then class ascending. No two are equal.
template <typename T>
struct Entry;

template <>
struct Entry<float> {
  unsigned long long key;
  static __device__ __forceinline__ Entry of(float value, int c) {
    const unsigned bits = __float_as_uint(value + 0.0f);  // -0 and +0 are equal
    return {static_cast<unsigned long long>(bits >> 31 ? bits : ~bits & 0x7fffffffu) << 32 | static_cast<unsigned>(c)};
  }
  static __device__ __forceinline__ Entry last() { return {~0ull}; }
  __device__ __forceinline__ float value() const {
    const unsigned bits = static_cast<unsigned>(key >> 32);
    return __uint_as_float(bits >> 31 ? bits : ~bits & 0x7fffffffu);
  }
  __device__ __forceinline__ int c() const { return static_cast<int>(key); }
  __device__ __forceinline__ bool before(const Entry& other) const { return key < other.key; }
};

template <>
struct Entry<double> {
  unsigned long long key, index;
  static __device__ __forceinline__ Entry of(double value, int c) {
    const auto bits = static_cast<unsigned long long>(__double_as_longlong(value + 0.0));
    return {bits >> 63 ? bits : ~bits & 0x7fffffffffffffffull, static_cast<unsigned long long>(c)};
  }
  static __device__ __forceinline__ Entry last() { return {~0ull, ~0ull}; }
  __device__ __forceinline__ double value() const {
    return __longlong_as_double(static_cast<long long>(key >> 63 ? key : ~key & 0x7fffffffffffffffull));
  }
  __device__ __forceinline__ int c() const { return static_cast<int>(index); }
  __device__ __forceinline__ bool before(const Entry& other) const {
    return key < other.key || (key == other.key && index < other.index);
  }
};

template <typename T>
struct First {
  Entry<T> entry;
  __device__ __forceinline__ void merge(const First& other) {
    if (other.entry.before(entry)) entry = other.entry;
  }
};

// Append the entries of those lanes that have one, in no order that matters. Every lane of the warp must come here.
template <typename T>
__device__ __forceinline__ void append(Entry<T>* entries, int* count, bool has, T value, int c) {
  const unsigned votes = __ballot_sync(kFullMask, has);
  if (!votes) return;
  const int leader = __ffs(votes) - 1, lane = static_cast<int>(lane_id());
  int place = lane == leader ? atomicAdd(count, __popc(votes)) : 0;
  place = __shfl_sync(kFullMask, place, leader) + __popc(votes & ((1u << lane) - 1));
  if (has) entries[place] = Entry<T>::of(value, c);
}

// A compare stage of a bitonic network decides for one of a pair: `forward` where the pair is to be in order.
template <typename T>
__device__ __forceinline__ Entry<T> sorted_by_warp(Entry<T> mine) {
  const int lane = static_cast<int>(lane_id());
  for (int size = 2; size <= 32; size *= 2)
    for (int distance = size / 2; distance >= 1; distance /= 2) {
      const Entry<T> other = shuffled_xor(mine, distance);
      const bool forward = (lane & size) == 0, lower = (lane & distance) == 0;
      if (other.before(mine) == (forward == lower)) mine = other;
    }
  return mine;
}

// entries[0 .. n), n a power of two, in shared memory.
template <typename T>
__device__ __forceinline__ void sort_in_shared(Entry<T>* entries, int n) {
  for (int size = 2; size <= n; size *= 2)
    for (int distance = size / 2; distance >= 1; distance /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < n / 2; pair += static_cast<int>(blockDim.x)) {
        const int low = pair / distance * (2 * distance) + pair % distance;
        const Entry<T> a = entries[low], b = entries[low + distance];
        if (b.before(a) == ((low & size) == 0)) entries[low] = b, entries[low + distance] = a;
      }
      __syncthreads();
    }
}

// Sorted runs of `length` entries, merged pairwise from one place into another.
template <typename T>
__device__ __forceinline__ void merge_runs(const Entry<T>* from, Entry<T>* to, int n, int length) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    const Entry<T> mine = from[i];
    const int run = i / length;
    const int sibling = (run ^ 1) * length;
    int low = 0, high = min(max(n - sibling, 0), length);
    while (low < high) {
      const int middle = (low + high) / 2;
      if (from[sibling + middle].before(mine))
        low = middle + 1;
      else
        high = middle;
    }
    to[i + (run / 2 * 2 - run) * length + low] = mine;
  }
}

// Order n entries of device memory; `room` entries, a power of two and at least 32, fit in `shared`. Returns where they
// are in order: in `shared`, in `entries` or in `spare`. All threads of the block must come here.
template <typename T>
__device__ __forceinline__ const Entry<T>* put_in_order(Entry<T>* entries, Entry<T>* spare, Entry<T>* shared, int room,
                                                        int n) {
  const int thread = static_cast<int>(threadIdx.x);
  if (n <= 32) {
    if (thread < 32) shared[thread] = sorted_by_warp(thread < n ? entries[thread] : Entry<T>::last());
    __syncthreads();
    return shared;
  }
  for (int start = 0; start < n; start += room) {
    const int count = min(room, n - start);
    int padded = 32;
    while (padded < count) padded *= 2;
    for (int i = thread; i < padded; i += static_cast<int>(blockDim.x))
      shared[i] = i < count ? entries[start + i] : Entry<T>::last();
    __syncthreads();
    sort_in_shared(shared, padded);
    if (n <= room) return shared;
    for (int i = thread; i < count; i += static_cast<int>(blockDim.x)) entries[start + i] = shared[i];
    __syncthreads();
  }
  for (int length = room; length < n; length *= 2) {
    merge_runs(entries, spare, n, length);
    __syncthreads();
    Entry<T>* const ordered = spare;
    spare = entries;
    entries = ordered;
  }
  return entries;
}

}  // namespace cuda
}  // namespace sortkd
