// What the row kernels are launched with: a job in the kernels' own arithmetic, and the launch choices.
#pragma once

#include "../kernels.h"

namespace sortkd {
namespace cuda {

// What the passes over a row compute. The general one serves any temperature and any chain through it; the others leave
// out what they can for plain KD, and for KD and cross-entropy at temperatures 1, 2 and 4, where exp(s) = exp(s / T)^T.
enum class Passes : int { Distillation, WithPower, General };

template <typename T>
struct LossParams {
  int64_t rows, inner;
  int C;
  Dtype student_dtype, teacher_dtype;  // only the scattered access looks at them
  const void* student;
  const void* teacher;
  const int64_t* teacher_indices;
  int k;
  void* grad_student;
  const int64_t* target;
  int64_t ignore_index;
  const T* temperature;
  int temperature_stride;
  T temperature_value;
  const T* upstream;
  int upstream_stride;
  const unsigned* counts;  // rows that count, by the block that counted; null without a mean
  int count_blocks;

  Correction correction;
  Passes passes;
  int power;  // of the exponential at temperature 1, for Passes::WithPower
  bool decoupled, standardize, with_ce, uniform_tail;
  T kd_weight, ce_weight, alpha, beta;

  T* loss;  // [rows], or null where the rows are reduced
  T* kd;    // [rows]
  T* ce;    // [rows], or null
  T* grad_temperature;
  int32_t* rank;  // [rows], or null

  // Tile: threads a row and the lanes between them; vectors that a thread holds at most; the largest rank that it
  // settles.
  int group, step, used, settled;
  // Rows that the tile leaves to the stream: how many, and which. Null for a stream over all rows.
  unsigned* left_count;
  int64_t* left;
  // Stream: for each block room for C entries, twice where they exceed shared memory, and a row for a top-k teacher.
  char* entries;
  int64_t entry_bytes;  // of a block
  int shared_entries;
  T* dense;
};

}  // namespace cuda
}  // namespace sortkd
