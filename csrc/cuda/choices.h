// The launch choices of the CUDA kernels, each with its reason. Nothing else in csrc/cuda holds such a number.
//
// No GPU has timed them: they follow from the register file and from what the compiled kernels show.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sortkd {
namespace cuda {

// What tests set to reach every code path with small rows; 0: as chosen below.
struct Overrides {
  int tile_group = 0;      // threads a row, a power of two up to 512
  int stream_threads = 0;  // threads a block, a power of two of whole warps
  int on_chip = 0;         // the most classes for the tile; -1: none
  int settled = -1;        // the largest rank that the tile settles
  int shared_entries = 0;  // a power of two, at least 32
  int blocks = 0;          // blocks of a stream
};
inline Overrides overrides;

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int power_of_two_over(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// A thread holds 8 vectors of 16 bytes of each side: 64 registers. Fewer rows in flight would not cover the memory's
// latency, more registers would leave fewer warps.
constexpr int kVectorsHeld = 8;

// Threads of a block of small rows. Four warps are enough to share a cache line of neighbouring rows, and leave little
// behind when the last block runs alone.
constexpr int kSmallBlock = 128;

// A rank that the tile settles, one reduction a step; trained teachers stay below it on nearly all rows. Rows of few
// classes are settled whatever their rank: another launch takes longer than the steps.
constexpr int kSettledRank = 8;
constexpr int kFewClasses = 24;

// Entries that a stream's block orders in shared memory: 16 or 32 KiB, which leave two blocks room on every
// architecture.
constexpr int kSharedEntries = 2048;

// Device memory for entries and top-k rows: a block on each of 132 processors up to C = 100,000.
constexpr int64_t kScratchBytes = 256 << 20;

// Rows that one block counts or sums, a few microseconds, and the most blocks that do.
constexpr int64_t kRowsABlock = 8192;
constexpr int kMostSumBlocks = 64;

// The most threads a row: 512 may have 128 registers each, of which a row takes 64. The general passes, doubles, and
// the addresses of scattered classes take more.
constexpr int most_tile_threads(bool doubles, bool general, bool peeled) {
  return doubles || general || !peeled ? 256 : 512;
}

// The most threads of a block of the kernels that stream: with doubles they need up to 150 registers.
constexpr int most_stream_threads(bool doubles) { return doubles ? 256 : 512; }

struct TileChoice {
  bool fits;
  int group, step, threads, used;
  int64_t blocks;
};

// `width`: classes of a vector; `peeled`: 16-byte access; `aligned`: every row begins at 16 bytes.
inline TileChoice choose_tile(int64_t rows, int64_t C, int64_t inner, int width, bool peeled, bool aligned,
                              int most_threads, int processors) {
  const int64_t held = kVectorsHeld * width;
  int group = power_of_two_over((C + held - 1) / held);
  // Each thread has room for one of the classes outside the vectors.
  if (peeled && !aligned) group = std::max(group, power_of_two_over(2 * (width - 1)));
  if (!peeled && inner == 1)
    // A class at a time: 8 lanes read a sector of 32 bytes. More would share the work on the row's scalars among fewer
    // rows.
    group = std::max(group, std::min(32, power_of_two_over(ceil_div(C, 16))));
  if (inner == 1)
    // Few rows: spread them over lanes that have nothing else to do. A row's scalars take each of its lanes as long as
    // 10 classes, so only while that leaves processors empty.
    while (group < 32 && group * width < C && rows * group < int64_t(processors) * 256) group *= 2;
  if (overrides.tile_group) group = std::max(group, overrides.tile_group);
  TileChoice choice{};
  const int64_t most = overrides.on_chip ? overrides.on_chip : most_threads * held;
  choice.fits = C <= most && group <= most_threads;
  choice.group = group;
  // With classes `inner` apart, neighbouring lanes take neighbouring rows.
  choice.step = inner > 1 && group < 32 ? 32 / group : 1;
  choice.threads = group > 32 ? group : kSmallBlock;
  choice.used = std::min<int>(kVectorsHeld, ceil_div(C, int64_t(width) * group));
  choice.blocks = (rows + choice.threads / group - 1) / (choice.threads / group);
  return choice;
}

// The largest rank that the tile settles.
inline int settled_rank(int64_t C) {
  if (overrides.settled >= 0) return overrides.settled;
  return C <= kFewClasses ? kFewClasses : kSettledRank;
}

struct StreamChoice {
  int threads, blocks, shared_entries;
  int64_t entry_bytes;  // device memory for the entries of a block
};

// `entry`: bytes of an entry; `dense`: bytes of a top-k teacher's class, or 0.
inline StreamChoice choose_stream(int64_t rows, int64_t C, int width, bool corrects, int entry, int dense,
                                  int processors) {
  StreamChoice choice{};
  // Two vectors a thread while that fills whole warps: rows that the tile left are often short.
  choice.threads = std::clamp(power_of_two_over(ceil_div(C, 2 * width)), 64, most_stream_threads(entry > 8));
  if (overrides.stream_threads) choice.threads = overrides.stream_threads;
  choice.shared_entries = corrects ? std::clamp(power_of_two_over(C), 32, kSharedEntries) : 0;
  if (corrects && overrides.shared_entries) choice.shared_entries = overrides.shared_entries;
  choice.entry_bytes = corrects ? (C > choice.shared_entries ? 2 : 1) * C * entry : 0;
  // 1024 threads a processor: at 64 registers they are all that fit.
  int64_t blocks = std::min<int64_t>(rows, int64_t(processors) * (1024 / choice.threads));
  blocks = std::min(blocks, std::max<int64_t>(1, kScratchBytes / std::max<int64_t>(1, choice.entry_bytes + dense * C)));
  choice.blocks = overrides.blocks ? overrides.blocks : static_cast<int>(std::max<int64_t>(1, blocks));
  return choice;
}

// The launches of a loss.
struct LossChoice {
  bool tiled, streamed;
  bool general;  // Passes::General
  TileChoice tile;
  StreamChoice stream;
};

// Blocks that share a sum over rows.
inline int sum_blocks(int64_t rows) {
  return rows <= kRowsABlock ? 1 : std::min(kMostSumBlocks, ceil_div(rows, kRowsABlock));
}

}  // namespace cuda
}  // namespace sortkd
