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

// Of integers the largest is at least 0.
template <typename T>
struct Largest {
  T student, teacher, second;  // `second`: of the teacher, the next largest
  SORTKD_DEVICE void add(T t) {
    second = max(second, min(teacher, t));
    teacher = max(teacher, t);
  }
  SORTKD_DEVICE void merge(const Largest& other) {
    student = max(student, other.student);
    second = max(max(second, other.second), min(teacher, other.teacher));
    teacher = max(teacher, other.teacher);
  }
  SORTKD_DEVICE Largest shuffled_xor(int offset) const {
    return {__shfl_xor_sync(kFullMask, student, offset), __shfl_xor_sync(kFullMask, teacher, offset),
            __shfl_xor_sync(kFullMask, second, offset)};
  }
  static SORTKD_DEVICE Largest none() { return {-kInfinity<T>, -kInfinity<T>, -kInfinity<T>}; }
};

// What a reduction takes of shared memory, from its start: the barriers of a cluster's two turns (and of near lists), and for
// each warp (and lane, of columns) a value of at most so many bytes. Two turns, so that one barrier a reduction is enough.
constexpr int kPartialBytes = 64, kMbarriers = 3, kMbarrierBytes = 32;
constexpr int partial_bytes(Kind kind, int threads, int cluster, int value_bytes = kPartialBytes) {
  const int values = kind == Kind::Lanes ? 0 : kind == Kind::Block ? threads / 32 * cluster : threads;
  return kMbarrierBytes + 2 * value_bytes * values;
}

template <typename V>
SORTKD_DEVICE V warp_merged(V value) {
#pragma unroll 1
  for (int offset = 16; offset >= 1; offset /= 2) value.merge(value.shuffled_xor(offset));
  return value;
}

// Up to four or eight sums over a warp, in every lane. In half the shuffles: each lane takes half of the sums that are
// left on, of it and another one, until it has one.
template <typename T, int n>
SORTKD_DEVICE Sums<T, n> warp_summed(const Sums<T, n>& sums) {
  static_assert(n <= 8);
  constexpr int kPlaces = n <= 4 ? 4 : 8;
  T held[kPlaces]{};
#pragma unroll
  for (int i = 0; i < n; ++i) held[i] = sums.of[i];
#pragma unroll
  for (int offset = 16, count = kPlaces / 2; offset >= 1; offset /= 2, count /= 2) {
    const bool upper = lane_id() & static_cast<unsigned>(offset);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const T kept = upper ? held[i + count] : held[i], given = upper ? held[i] : held[i + count];
      held[i] = kept + __shfl_xor_sync(kFullMask, given, offset);
    }
    if (count == 0) held[0] += __shfl_xor_sync(kFullMask, held[0], offset);
  }
  Sums<T, n> all;
#pragma unroll
  for (int i = 0; i < n; ++i) all.of[i] = __shfl_sync(kFullMask, held[0], 32 / kPlaces * i);
  return all;
}

// The sum over a warp's lanes up to this one, or over as many of them as have a row.
SORTKD_DEVICE int warp_prefix(int count, int lanes = 32) {
  const int lane = static_cast<int>(lane_id()) & (lanes - 1);
#pragma unroll 1
  for (int distance = 1; distance < lanes; distance *= 2) {
    const int lower = __shfl_up_sync(kFullMask, count, distance, lanes);
    if (lane >= distance) count += lower;
  }
  return count;
}

SORTKD_DEVICE int warp_sum(int n) {
#if defined(__CUDA_ARCH__)
  return __reduce_add_sync(kFullMask, n);
#else
  return warp_merged(Sums<int, 1>{n}).of[0];
#endif
}

template <Kind kind>
struct Group {
  int size;         // threads of the row
  int member;       // this one among them
  int slot;         // the row's place among the block's
  int cluster;      // blocks of the row, for Kind::Block
  unsigned rank;    // this block among them
  int turns;        // reductions until now
  int value_bytes;  // of what is reduced, at most

  SORTKD_DEVICE Group(int log_lanes, int cluster, int value_bytes = kPartialBytes)
      : cluster(cluster), rank(0), turns(0), value_bytes(value_bytes) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if constexpr (kind == Kind::Lanes) {
      size = 1 << log_lanes, member = thread & (size - 1), slot = thread >> log_lanes;
    } else if constexpr (kind == Kind::Block) {
      if (blocks() > 1) rank = cluster_rank();
      size = threads * blocks(), member = static_cast<int>(rank) * threads + thread, slot = 0;
    } else {
      size = threads / 32, member = thread / 32, slot = thread % 32;
    }
  }

  SORTKD_DEVICE int blocks() const { return kind == Kind::Block && SORTKD_CLUSTER ? cluster : 1; }
  // Of a cluster's blocks: the others' shared memory is there; and nobody looks into this one's any more.
  SORTKD_DEVICE void open() const {
    if (blocks() == 1) return;
    if (threadIdx.x < kMbarriers) mbarrier_init(mbarrier(static_cast<int>(threadIdx.x)));
    cluster_barrier();
  }
  SORTKD_DEVICE void close() const {
    if (blocks() > 1) cluster_barrier();
  }
  // Among those of the grid that work on rows of their own.
  SORTKD_DEVICE int index() const { return static_cast<int>(blockIdx.x) / blocks(); }
  // Whether this thread has vector g of its row.
  SORTKD_DEVICE bool has(int g) const { return member == (kind == Kind::Lanes ? g & (size - 1) : g % size); }

  // Of a cluster's blocks the one that does what is done once a row.
  SORTKD_DEVICE bool is_first_block() const { return rank == 0; }
  // Of the row's threads that are in one block.
  SORTKD_DEVICE void sync() const {
    if constexpr (kind == Kind::Lanes)
      __syncwarp();
    else
      __syncthreads();
  }

  // Whether a row of those that take their steps together says so, as all of its threads do: of a warp's rows, and every
  // warp of columns has one thread of each.
  SORTKD_DEVICE bool any(bool says) const { return kind == Kind::Block ? says : __any_sync(kFullMask, says); }

  static SORTKD_DEVICE Mbarrier* mbarrier(int turn) { return reinterpret_cast<Mbarrier*>(shared_memory()) + turn; }
  template <typename V>
  SORTKD_DEVICE V* partials(int count) const {
    static_assert(sizeof(V) <= kPartialBytes);
    assert(static_cast<int>(sizeof(V)) <= value_bytes);
    return reinterpret_cast<V*>(shared_memory() + kMbarrierBytes + (turns & 1) * value_bytes * count);
  }
  // What a block's warps would all compute alike, its first warp computes for them.
  SORTKD_DEVICE bool leads() const { return kind != Kind::Block || threadIdx.x < kWarp; }
  SORTKD_DEVICE int row_warps() const { return static_cast<int>(static_cast<unsigned>(size) / kWarp); }

  // What each warp of a row's blocks has, by block and warp, in order. For the threads that wait for it.
  template <typename V>
  SORTKD_DEVICE const V* exchanged(const V& value, bool waits = true) {
    const int count = row_warps(), lane = static_cast<int>(lane_id());
    V* const all = partials<V>(count);
    V* const place = all + static_cast<unsigned>(member) / kWarp;
    if (blocks() > 1) {
      // Who is two turns ahead has had this turn's values of every warp, which have read those of the turn before.
      Mbarrier* const barrier = mbarrier(turns & 1);
      if (threadIdx.x == 0) mbarrier_arrive_expect(barrier, count * static_cast<int>(sizeof(V)));
      if (lane < blocks()) send_async(place, value, barrier, static_cast<unsigned>(lane));
      if (waits) mbarrier_wait(barrier, turns >> 1 & 1);
    } else {
      if (lane == 0) *place = value;
      __syncthreads();
    }
    ++turns;
    return all;
  }

  // Of entries that the row's threads have `count` of each, in the order of the threads: the place of this one's first,
  // and how many there are of all.
  struct Places {
    int first, all;
  };
  SORTKD_DEVICE Places places_of(int count) {
    const int lanes = kind == Kind::Lanes ? size : static_cast<int>(kWarp), lane = member & (lanes - 1);
    const int last = warp_prefix(count, lanes);
    const int own = __shfl_sync(kFullMask, last, lanes - 1, lanes);
    if constexpr (kind == Kind::Lanes) return {last - count, own};
    const Sums<int, 1>* const warps = exchanged(Sums<int, 1>{own});
    Sums<int, 2> sums{};  // of the warps before this one, of all
#pragma unroll 1
    for (int w = lane; w < row_warps(); w += 32)
      sums.merge({w < member / static_cast<int>(kWarp) ? warps[w].of[0] : 0, warps[w].of[0]});
    sums = warp_merged(sums);
    return {sums.of[0] + last - count, sums.of[1]};
  }

  // The values of the row's threads merged in a fixed order, in every thread.
  template <typename V>
  SORTKD_DEVICE V merged(V value) {
    const int lane = static_cast<int>(lane_id());
    if constexpr (kind == Kind::Lanes) {
#pragma unroll 1
      for (int offset = size >> 1; offset >= 1; offset >>= 1) value.merge(value.shuffled_xor(offset));
    } else if constexpr (kind == Kind::Columns) {
      V* const all = partials<V>(static_cast<int>(blockDim.x));
      ++turns;
      all[threadIdx.x] = value;
      __syncthreads();
      value = all[lane];
#pragma unroll 1
      for (int w = 1; w < size; ++w) value.merge(all[w * 32 + lane]);
    } else {
      const V* const all = exchanged(warp_merged(value));
      value = V::none();
#pragma unroll 1
      for (int i = lane; i < row_warps(); i += 32) value.merge(all[i]);
      value = warp_merged(value);
    }
    return value;
  }

  // The sums over a row of blocks, for the threads that lead; and over its warps' numbers of `listed` entries, of all and
  // of the warps before this one, for those too that have some.
  template <typename T, int n>
  struct alignas(16) WarpPart {
    Sums<T, n> sums;
    int listed;
  };
  template <typename T, int n>
  SORTKD_DEVICE Sums<T, n> merged(const Sums<T, n>& sums, int listed, Sums<int, 2>& all_and_before) {
    WarpPart<T, n> part{warp_summed(sums), listed};
    all_and_before = {};
    if (blocks() > 1 && !leads() && listed == 0) {
      exchanged(part, false);
      return part.sums;
    }
    const WarpPart<T, n>* const all = exchanged(part);
    const int warp = static_cast<int>(static_cast<unsigned>(member) / kWarp);
    part = {};
#pragma unroll 1
    for (int i = static_cast<int>(lane_id()); i < row_warps(); i += 32) {
      const WarpPart<T, n> other = all[i];
      part.sums.merge(other.sums);
      all_and_before.merge({other.listed, i < warp ? other.listed : 0});
    }
    if (__any_sync(kFullMask, all_and_before.of[0])) all_and_before = warp_merged(all_and_before);
    return warp_summed(part.sums);
  }
};

}  // namespace cuda
}  // namespace sortkd
