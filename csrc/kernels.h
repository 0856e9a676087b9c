// The bridge from forward.cpp to the kernels of a device: plain pointers and numbers, no torch types.
//
// Shapes: N rows = outer * inner; logits are [outer, C, inner] (inner = 1: rows contiguous), row values are [N]. Every tensor
// of logits in a call has the layout of the student. "acc" is float, or double where an input is double. Pointers are the
// device's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "loss_config.h"

namespace sortkd {

enum class Dtype : int { Float, Double, BFloat16, Half };

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::Double ? 8 : dtype == Dtype::Float ? 4 : 2; }

// Rows and their classes.
struct Layout {
  int64_t outer, C, inner;
  int64_t rows() const { return outer * inner; }
};

// Of the arguments of a loss those that every kernel takes as they are.
struct LossInputs {
  LossConfig config;
  Dtype student_dtype, teacher_dtype;
  const void* student;
  const void* teacher;  // [outer, C, inner]; of a top-k teacher [N, k] values, or [N, k + 2] with Tail::Bucket (cpu/bucket.h)
  const void* teacher_indices;  // [N, k], or null for a full teacher
  bool int64_indices;           // else int32
  const int64_t* target;        // [N], each in [0, C) or ignore_index: the kernels check it
  int32_t* rank;                // [N], or null
};

struct LossArgs : LossInputs {
  Layout layout;
  int64_t k;
  const void* temperature;     // acc, [N] or [1], or null: config.temperature
  int64_t temperature_stride;  // 1 or 0
  const void* grad_output;     // acc, [N] or [1]: d result / d loss; null: 1
  int64_t grad_output_stride;  // 1 or 0
  void* loss;                  // acc, [N] or, reduced, [1]
  void* kd;                    // acc, as loss, or null
  void* ce;                    // acc, as loss, or null
  void* grad_student;          // student's dtype, [outer, C, inner], may be the student itself; or null
  void* grad_temperature;      // acc [N], or null

  bool acc_double() const { return student_dtype == Dtype::Double || teacher_dtype == Dtype::Double; }
};

struct SortArgs {
  int64_t rows, C;
  Correction correction;
  Dtype dtype;
  const void* teacher;    // [rows, C]
  const int64_t* target;  // [rows]
  int64_t ignore_index;
  void* corrected;  // like teacher
};

// grad = grad * grad_output, to another place or to its own.
struct ScaleArgs {
  Layout layout;
  Dtype dtype;
  const void* grad_output;     // float, or double for doubles; [N] or [1]
  int64_t grad_output_stride;  // 1 or 0
  const void* grad;            // [outer, C, inner]
  void* scaled;                // like grad
};

// Each launcher is given so many bytes of its device's memory, aligned to 256 on a GPU, that need not survive the call.
namespace cpu {
size_t scratch_bytes(const LossArgs& args);
void run_loss(const LossArgs& args, void* scratch);
void run_sort(const SortArgs& args);
const char* capability();
}  // namespace cpu

namespace cuda {
// On `stream` of the current device: no allocation, no synchronization. Returns a cudaError_t.
size_t scratch_bytes(const LossArgs& args);
size_t scratch_bytes(const SortArgs& args);
int run_loss(const LossArgs& args, void* scratch, void* stream);
int run_sort(const SortArgs& args, void* scratch, void* stream);
int run_scale(const ScaleArgs& args, void* stream);
}  // namespace cuda

}  // namespace sortkd
