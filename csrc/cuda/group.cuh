// The threads that work on one row, and how they agree.
#pragma once

#include "device.cuh"

namespace sortkd {
namespace cuda {

enum class Kind {
  Lanes,    // 1 to 32 lanes of a warp: several rows a warp
  Block,    // a block, or a cluster of blocks
  Columns,  // 32 rows a block, a row a lane: for classes that lie apart, where neighbouring rows are next to each other
};

template <typename T, int n>
struct Sums {
  T of[n];
  SORTKD_DEVICE void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < n; ++i) of[i] += other.of[i];
  }
  SORTKD_DEVICE Sums shuffled_xor(int offset) const {
    Sums other;
#pragma unroll
    for (int i = 0; i < n; ++i) other.of[i] = __shfl_xor_sync(kFullMask, of[i], offset);
    return other;
  }
  static SORTKD_DEVICE Sums none() { return {}; }
};

// What a reduction takes of shared memory: for each warp (and lane, of columns) a value of at most so many bytes. Two
// turns, so that one barrier a reduction is enough.
constexpr int kPartialBytes = 64;
constexpr int partial_bytes(Kind kind, int threads, int cluster) {
  return 2 * kPartialBytes * (kind == Kind::Lanes ? threads / 32 : kind == Kind::Block ? threads / 32 * cluster : threads);
}

template <typename V>
SORTKD_DEVICE V warp_merged(V value) {
#pragma unroll 1
  for (int offset = 16; offset >= 1; offset /= 2) value.merge(value.shuffled_xor(offset));
  return value;
}

// Up to four sums over a warp, of which lane 8 i has the i-th: half the shuffles of all sums in every lane.
template <int n>
SORTKD_DEVICE float warp_scattered(const Sums<float, n>& sums) {
  static_assert(n <= 4);
  float held[4]{};
#pragma unroll
  for (int i = 0; i < n; ++i) held[i] = sums.of[i];
  const auto halve = [&](int offset, int count) {
    const bool upper = lane_id() & static_cast<unsigned>(offset);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float kept = upper ? held[i + count] : held[i], given = upper ? held[i] : held[i + count];
      held[i] = kept + __shfl_xor_sync(kFullMask, given, offset);
    }
  };
  halve(16, 2);
  halve(8, 1);
#pragma unroll
  for (int offset = 4; offset >= 1; offset /= 2) held[0] += __shfl_xor_sync(kFullMask, held[0], offset);
  return held[0];
}
template <int n>
SORTKD_DEVICE Sums<float, n> warp_gathered(float scattered) {
  Sums<float, n> sums;
#pragma unroll
  for (int i = 0; i < n; ++i) sums.of[i] = __shfl_sync(kFullMask, scattered, 8 * i);
  return sums;
}

// What block_merged takes of shared memory: a value of at most so many bytes for each thread.
constexpr int kMergingBytes = 16;

// The values of a block's threads merged in a fixed order, in every thread. Barriers before and after. Once or twice a
// kernel: in few instructions, and of a double's two words no shuffles.
template <typename V>
SORTKD_DEVICE V block_merged(const V& value, char* shared) {
  static_assert(sizeof(V) <= kMergingBytes);
  V* const values = reinterpret_cast<V*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  values[thread] = value;
  __syncthreads();
#pragma unroll 1
  for (int left = static_cast<int>(blockDim.x); left > 1;) {
    const int half = (left + 1) / 2;
    if (thread + half < left) values[thread].merge(values[thread + half]);
    left = half;
    __syncthreads();
  }
  const V all = values[0];
  __syncthreads();
  return all;
}

template <Kind kind>
struct Group {
  static constexpr Kind kKind = kind;
  int size;       // threads of the row
  int member;     // this one among them
  int slot;       // the row's place among the block's
  int cluster;    // blocks of the row, for Kind::Block
  unsigned rank;  // this block among them
  int turn;

  SORTKD_DEVICE Group(int log_lanes, int blocks) : cluster(blocks), rank(0), turn(0) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if constexpr (kind == Kind::Lanes) {
      size = 1 << log_lanes, member = thread & (size - 1), slot = thread >> log_lanes;
    } else if constexpr (kind == Kind::Block) {
      if (cluster > 1) rank = cluster_rank();
      size = threads * cluster, member = static_cast<int>(rank) * threads + thread, slot = 0;
    } else {
      size = threads / 32, member = thread / 32, slot = thread % 32;
    }
  }

  SORTKD_DEVICE int blocks() const { return kind == Kind::Block ? cluster : 1; }
  // Among those of the grid that work on rows of their own.
  SORTKD_DEVICE int index() const { return static_cast<int>(blockIdx.x) / blocks(); }
  // Whether this thread has vector g of its row.
  SORTKD_DEVICE bool has(int g) const { return member == (kind == Kind::Lanes ? g & (size - 1) : g % size); }

  // The list of a row is kept by its threads, or those of the cluster's first block.
  SORTKD_DEVICE bool keeps_list() const { return kind != Kind::Block || rank == 0; }
  SORTKD_DEVICE int list_member() const { return kind == Kind::Block ? static_cast<int>(threadIdx.x) : member; }
  SORTKD_DEVICE int list_size() const { return kind == Kind::Block ? static_cast<int>(blockDim.x) : size; }
  SORTKD_DEVICE void list_sync() const {
    if constexpr (kind == Kind::Lanes)
      __syncwarp();
    else
      __syncthreads();
  }
  SORTKD_DEVICE void sync() const {
    if (kind == Kind::Block && cluster > 1)
      cluster_barrier();
    else
      list_sync();
  }

  // Whether a row of those that share barriers says so: a row of a block's, in a block's own row every thread says the
  // same.
  SORTKD_DEVICE bool any(bool says) const {
    if constexpr (kind == Kind::Lanes) return __any_sync(kFullMask, says);
    if constexpr (kind == Kind::Columns) return __syncthreads_or(says);
    return says;
  }

  // The values of the row's threads merged in a fixed order, in every thread.
  template <typename V>
  SORTKD_DEVICE V merged(V value) {
    static_assert(sizeof(V) <= kPartialBytes);
    if constexpr (kind == Kind::Lanes) {
#pragma unroll 1
      for (int offset = size >> 1; offset >= 1; offset >>= 1) value.merge(value.shuffled_xor(offset));
      return value;
    }
    const int warps = static_cast<int>(blockDim.x / kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(lane_id());
    if constexpr (kind == Kind::Columns) {
      V* const partial = reinterpret_cast<V*>(shared_memory() + turn * kPartialBytes * static_cast<int>(blockDim.x));
      turn ^= 1;
      partial[threadIdx.x] = value;
      __syncthreads();
      value = partial[lane];
#pragma unroll 1
      for (int w = 1; w < warps; ++w) value.merge(partial[w * 32 + lane]);
      return value;
    }
    V* const partial = reinterpret_cast<V*>(shared_memory() + turn * kPartialBytes * warps * cluster);
    turn ^= 1;
    value = warp_merged(value);
    if (cluster > 1) {
      if (lane < cluster) *in_block(partial + static_cast<int>(rank) * warps + warp, lane) = value;
      cluster_barrier();
    } else {
      if (lane == 0) partial[warp] = value;
      __syncthreads();
    }
    value = V::none();
#pragma unroll 1
    for (int i = lane; i < warps * cluster; i += 32) value.merge(partial[i]);
    return warp_merged(value);
  }

  // The sums over a row of a warp or of blocks, in few instructions, and whether any of its threads says so. The first
  // sum is not negative: for a warp that says so its sign does.
  template <int n>
  SORTKD_DEVICE Sums<float, n> merged(const Sums<float, n>& sums, bool& says) {
    float mine = warp_scattered(sums);
    says = __any_sync(kFullMask, says);
    if constexpr (kind == Kind::Lanes) return warp_gathered<n>(mine);
    const int warps = static_cast<int>(blockDim.x / kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(lane_id());
    if (says && lane < 8) mine = -mine;
    float4* const partial = reinterpret_cast<float4*>(shared_memory() + turn * kPartialBytes * warps * cluster);
    turn ^= 1;
    float* const place = reinterpret_cast<float*>(partial + static_cast<int>(rank) * warps + warp) + lane / 8;
    if (cluster > 1) {
      // Eight lanes have each sum.
#pragma unroll 1
      for (int to = lane % 8; to < cluster; to += 8) *in_block(place, static_cast<unsigned>(to)) = mine;
      cluster_barrier();
    } else {
      if (lane % 8 == 0) *place = mine;
      __syncthreads();
    }
    Sums<float, 4> all{};
    says = false;
#pragma unroll 1
    for (int i = lane; i < warps * cluster; i += 32) {
      const float4 part = partial[i];
      all.merge({fabsf(part.x), part.y, part.z, part.w});
      says |= __float_as_int(part.x) < 0;
    }
    says = __any_sync(kFullMask, says);
    return warp_gathered<n>(warp_scattered(all));
  }
};

}  // namespace cuda
}  // namespace sortkd
