// The launch choices of the CUDA kernels, each with its reason. Nothing else in csrc/cuda holds such a number.
#pragma once

#include <algorithm>
#include <cstdint>

#include "group.cuh"

namespace sortkd {
namespace cuda {

// What the passes over a row compute: KD, and at temperature 1 the cross-entropy, which has the same exponentials; KD and
// the cross-entropy at temperatures 2 and 4, where exp(s) = exp(s / T)^T; at another temperature, with exponentials of its
// own, of rows that are held; or what else there is: z-scores, the temperature's gradient, a temperature in a tensor. With
// the last two, threads hold as many classes as they can.
enum class Mode { Kd, KdCe, KdCeAny, General };

// What tests set to reach every code path with small rows; 0: as chosen below.
struct Overrides {
  int lanes = 0;        // at least so many lanes a row; more than 32: so many threads of a block
  int threads = 0;      // of a block that reads its rows from memory twice
  int cluster = 0;      // blocks a row
  int from_memory = 0;  // 1: no row is held in registers
  int list_room = 0;    // entries of a block's list
  int long_room = 0;    // entries that shared memory holds of a long list; then one block has device memory for others
  int blocks = 0;       // of a launch
};
inline Overrides overrides;

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int power_of_two_over(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// Classes that a thread holds at most: two exponentials each are 64 registers, and 16 warps a processor are what 128
// registers leave. Each has its next row on the way meanwhile, 4 to 8 KiB, where 32 KiB a processor cover the memory's
// latency.
constexpr int kValuesHeld = 32;

// Threads of a block of rows of lanes. Four warps leave little behind when the last block runs alone.
constexpr int kSmallBlock = 128;

// Threads of a block that holds a row; beyond that a cluster of 2, 4 or 8 of them. With 128 registers two such blocks
// are on a processor, so that one row's loads overlap another's gradient; rows beyond eight of them take blocks of
// twice as many, one a processor. Eight blocks a cluster are what every device with clusters may run, sixteen what
// some do; either where the device says so. Longer rows are read twice, at four exponentials a class: of more than 262144 or
// 131072 classes, on devices without clusters of more than 16384; rows of floats of more than half as many, too, where a block
// has less than 190 KiB of shared memory. On an H200 blocks of 128 and of 512 are within 3% of these at C = 21841 and 32000,
// and a quarter slower at 10000; clusters of sixteen are slower where eight do.
constexpr int kRowBlock = 256, kMostRowBlock = 512, kCluster = 8, kMostCluster = 16;

// The same of the general kernels, which need up to 168 registers: three blocks a processor; and of columns, a warp for
// each 32 of a row's classes.
constexpr int kGeneralRowBlock = 128, kMostGeneralBlock = 384, kMostColumnsBlock = 256;

// Threads of a row kernel's block at most.
constexpr int most_threads(Kind kind, Mode mode) {
  if (kind == Kind::Lanes) return kSmallBlock;
  if (kind == Kind::Columns) return kMostColumnsBlock;
  return mode == Mode::General ? kMostGeneralBlock : kMostRowBlock;
}

// Warps that hold rows and run at once on a processor, by their registers.
constexpr int held_warps(Kind kind, Mode mode) {
  return mode == Mode::General || (mode == Mode::KdCeAny && kind == Kind::Lanes) ? 12 : 16;
}

// Threads of the labels' count, of the correction alone at most, and of the scaling; and those that a processor runs at
// once.
constexpr int kCountThreads = 1024, kSortThreads = 512, kScaleThreads = 256, kProcessorThreads = 2048;

// Loads of either side that a thread has under way where a row is read from memory, so that the blocks of a processor
// have some 32 KiB under way: of 16 bytes; of vectors of two dtypes; of single classes whose dtype the call alone
// knows, and which the compiler knows.
constexpr int kVectorsAhead = 1, kWholeVectorsAhead = 2, kMixedAhead = 4, kClassesAhead = 8;

// Classes of a row of Kind::Columns: up to 8 warps a block, which take 97 KiB at most where some devices have 99.
constexpr int kMostColumnClasses = 256;

// Entries of a list of rows that are read twice, or only corrected: 16 KiB. A trained teacher leaves nearly all rows far below;
// the others go to a launch of their own.
constexpr int kListRoom = 2048;

// Most wrong rows of a trained teacher have a few classes above the label. Lists of rows that are held have so few entries that
// each looks at all others, and nothing is sorted; with both logits, so that nothing is read from memory again. Entries by the
// lane of rows of lanes, three, so that the four blocks of a processor fit into 164 KiB (rotate.cuh takes rows with more); of a
// block's row, and by each of its warps, an entry a lane (rows with more go to that launch).
constexpr int kNearEntries = 3, kNearOfBlock = 64, kNearOfWarp = 32, kNearBytes = 16;

// A row whose temperature's gradient is pending.
constexpr int kPendingBytes = 80;

// Device memory of that launch. Of floats at most half of it holds the corrected logits of each block's row, by class; the rest
// is for lists that are too long for a block's shared memory, which has room for 14,000 entries where it has 227 KiB. Of
// halves it is for rows of more than 26,000 different values, for which that has room (value_table.cuh).
constexpr int64_t kListBytes = 64 << 20;
constexpr int kHalves = 1 << 16, kPlaceBytes = 8, kTableBytes = kHalves / 32 * 8;

// Threads of a block that has such a row of halves: one block a processor, as its 128 registers leave; mostly there are few
// rows.
constexpr int kTableBlock = 512;

// Shared memory that every launch may have.
constexpr size_t kGrantedShared = 48 << 10;

// Rows whose labels each block counts itself: four loads of a thread, under way beside its first row's. More are counted once,
// by a launch.
constexpr int64_t kCountedByBlocks = 512;
constexpr int kRowsACounter = 8192, kMostCounters = 64;

// Sums of blocks that a lane reads at a time at the end: a warp has those of 528 blocks, four a processor, in two trips.
constexpr int kPartialsAhead = 9;

// Blocks of a grid, by the processor: of rows that are held as many as run at once, so that each goes from row to row with
// the next one on its way; else several times what runs at once, so that the last ones end together, and few enough that
// one warp adds up their sums in some microseconds.
constexpr int kBlocksAProcessor = 16;

// Of the scaling kernel, which mostly looks at one number and ends: few, and loads of a thread that are under way, 32 KiB a
// processor.
constexpr int kScaleBlocks = 4, kScaleAhead = 2;

// What is asked of the runtime once a device.
struct Device {
  int processors, cache_bytes, shared_bytes;  // shared: of a block
  int cluster;                                // blocks that a cluster may have; 1: there are none
  bool overlaps;                              // a launch may begin while the one before it runs, in a captured graph too
};

// Of the launch for long lists: the entries, or values, of so many bytes, for which there is room in what is left of a block's
// shared memory.
inline int choose_long_room(int64_t most, int used_bytes, int entry_bytes, const Device& device) {
  if (overrides.long_room) return overrides.long_room;
  const int64_t room = (device.shared_bytes - used_bytes) / entry_bytes;
  return static_cast<int>(std::clamp<int64_t>(room, 0, most));
}

struct Shape {
  Kind kind;
  int held;  // vectors a thread; 0: the row is read from memory twice, the second time from the level 2 cache
  int lanes, threads, cluster;
  int rows;       // of a block
  int bytes = 0;  // of a block's shared memory, where rows are held
};

// Vectors of a row, of `width` classes; `aligned`: every row begins at 16 bytes.
inline int64_t vectors_of(int64_t C, int width, bool aligned) {
  return aligned ? ceil_div(C, width) : (C + 2 * width - 2) / width;
}

// Two vectors a thread while that fills whole warps.
inline Shape read_twice(int64_t vectors, int most_threads) {
  int threads = std::clamp(power_of_two_over(ceil_div(vectors, 2)), 64, most_threads);
  if (overrides.threads) threads = overrides.threads;
  return {Kind::Block, 0, 1, threads, 1, 1};
}

// Rows of so many vectors of `width` classes: held where threads of a kernel of the mode can.
inline Shape choose_vectors(int64_t rows, int64_t vectors, int width, Mode mode, const Device& device) {
  const int most_held = kValuesHeld / width, most = most_threads(Kind::Block, mode);
  const int row_block = mode == Mode::General ? kGeneralRowBlock : kRowBlock;
  if (!overrides.from_memory) {
    Shape shape{};
    // A class costs a lane some 13 instructions, a row some 400 more in each of its lanes. With rows for every lane of
    // the device the sum counts; with fewer the time of one row.
    int64_t best = -1;
    for (int held : {1, 4, 8}) {
      if (held > most_held || (mode >= Mode::KdCeAny && held != most_held)) continue;
      int lanes = power_of_two_over(ceil_div(vectors, held));
      if (overrides.lanes) lanes = std::max(lanes, overrides.lanes);
      if (lanes > 32) continue;
      const int64_t row_cost = held * width * 13 + 400;
      const int64_t waves = std::max<int64_t>(1, rows * lanes / (static_cast<int64_t>(device.processors) * 512));
      const int64_t cost = waves * row_cost;
      if (best < 0 || cost < best) {
        best = cost;
        shape = {Kind::Lanes, held, lanes, kSmallBlock, 1, kSmallBlock / lanes};
      }
    }
    if (best >= 0) return shape;
    int threads = ceil_div(ceil_div(vectors, most_held), 32) * 32, cluster = 1;
    if (overrides.lanes > 32) threads = std::max(threads, overrides.lanes);
    if (device.cluster > 1 || overrides.cluster) {
      cluster = std::min(kCluster, power_of_two_over(ceil_div(threads, row_block)));
      if (device.cluster == kMostCluster && ceil_div(threads, cluster) > most) cluster = kMostCluster;
      if (overrides.cluster) cluster = overrides.cluster;
      threads = ceil_div(ceil_div(threads, cluster), 32) * 32;
    }
    if (threads <= most) return {Kind::Block, most_held, 1, threads, cluster, 1};
  }
  return read_twice(vectors, most);
}

inline Shape choose_columns(int64_t C) { return {Kind::Columns, kValuesHeld, 1, ceil_div(C, kValuesHeld) * 32, 1, 32}; }

inline Shape choose_mixed(int64_t C) { return read_twice(ceil_div(C, 4), kMostGeneralBlock); }
inline Shape choose_by_value(int64_t C) { return read_twice(ceil_div(C, 8), kTableBlock); }

// Blocks (of a cluster: all of them) of a launch over so many rows.
inline int choose_blocks(const Shape& shape, Mode mode, int64_t rows, int64_t row_bytes, const Device& device) {
  const bool held = shape.held > 0 && shape.kind != Kind::Columns;
  // What a processor has is what a block may have, and a KiB that each block takes.
  const int fit = held ? (device.shared_bytes + 1024) / (shape.bytes + 1024) : 0;
  int64_t most = static_cast<int64_t>(device.processors) *
                 (held ? std::max(std::min(held_warps(shape.kind, mode) * 32 / shape.threads, fit), 1) : kBlocksAProcessor);
  // Rows that are read twice: no more of them at a time than the level 2 cache has room for, but a block a processor.
  if (shape.held == 0)
    most = device.processors * std::clamp<int64_t>(device.cache_bytes / 2 / (row_bytes * device.processors), 1,
                                                   std::max(1, kProcessorThreads / shape.threads));
  if (overrides.blocks) most = overrides.blocks;
  const int64_t tiles = (rows + shape.rows - 1) / shape.rows;
  return static_cast<int>(std::clamp<int64_t>(most / shape.cluster, 1, std::max<int64_t>(tiles, 1))) * shape.cluster;
}

}  // namespace cuda
}  // namespace sortkd
