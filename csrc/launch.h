// The bridge between the dispatcher and the row kernels: plain pointers and numbers, no torch types beyond the dtype tag.
//
// Shapes: N rows = outer * inner; logits are [outer, C, inner] (inner = 1: rows contiguous), row values are [N].
// "acc" is float, or double where an input is double.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "options.h"

namespace sortkd {

struct LossArgs {
  Layout layout;
  LossOptions options;
  bool acc_double;
  c10::ScalarType student_dtype, teacher_dtype;
  const void* student;             // [outer, C, inner]
  const void* teacher;             // [outer, C, inner], or [N, k] values of a top-k teacher
  const int64_t* teacher_indices;  // [N, k], or null for a full teacher
  int64_t k;
  const int64_t* target;           // [N], each in [0, C) or ignore_index
  int64_t ignore_index;
  const void* temperature;         // acc, [N] or [1]
  int64_t temperature_stride;      // 1 or 0
  const void* upstream;            // acc, [N] or [1]: d result / d row loss, already with the mean's 1/n
  int64_t upstream_stride;         // 1 or 0
  void* kd;                        // acc [N]
  void* ce;                        // acc [N], or null
  int32_t* rank;                   // [N], or null
  void* grad_student;              // student's dtype, [outer, C, inner], or null
  void* grad_temperature;          // acc [N], or null
};

struct SortArgs {
  Layout layout;
  Correction correction;
  c10::ScalarType dtype;
  const void* teacher;    // [outer, C, inner]
  const int64_t* target;  // [N]
  int64_t ignore_index;
  void* corrected;        // like teacher
};

namespace cpu {

// Run every row on the threads of ATen, with the widest instruction set that this processor has.
void sort_kd_loss(const LossArgs& args);
void sort_kd_sort(const SortArgs& args);
const char* capability();

}  // namespace cpu
}  // namespace sortkd
