// The bridge between forward.cpp and the CUDA sources: plain pointers and numbers, no torch types. All pointers are the
// device's.
//
// Shapes: N rows = outer * inner; logits are [outer, C, inner] (inner = 1: rows contiguous), row values are [N].
// "acc" is float, or double where an input is double.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../options.h"

namespace sortkd {
namespace cuda {

enum class Dtype : int { Float, Double, BFloat16, Half };

struct LossJob {
  Layout layout;
  LossOptions options;
  Reduction reduction;
  bool acc_double;
  Dtype student_dtype, teacher_dtype;
  const void* student;             // [outer, C, inner]
  const void* teacher;             // [outer, C, inner], or [N, k] values of a top-k teacher
  const int64_t* teacher_indices;  // [N, k], or null for a full teacher
  int64_t k;
  const int64_t* target;           // [N], each in [0, C) or ignore_index: the kernels assert it
  int64_t ignore_index;
  const void* temperature;         // acc, [N] or [1], or null: temperature_value
  int64_t temperature_stride;      // 1 or 0
  double temperature_value;
  const void* upstream;            // acc, [N] or [1]: d result / d loss; null: 1
  int64_t upstream_stride;         // 1 or 0
  void* loss;                      // acc, [N] or, reduced, [1]
  void* kd;                        // acc, as loss, or null
  void* ce;                        // acc, as loss, or null
  int32_t* rank;                   // [N], or null
  void* grad_student;              // student's dtype, [outer, C, inner], may be the student itself; or null
  void* grad_temperature;          // acc [N], or null
};

struct SortJob {
  int64_t rows, C;
  Correction correction;
  Dtype dtype;
  const void* teacher;    // [rows, C]
  const int64_t* target;  // [rows]
  int64_t ignore_index;
  void* corrected;        // like teacher
};

// grad = grad * upstream, to another place or to its own.
struct ScaleJob {
  Layout layout;
  Dtype dtype;
  const void* upstream;     // float, or double for doubles; [N] or [1]
  int64_t upstream_stride;  // 1 or 0
  const void* grad;         // [outer, C, inner]
  void* scaled;             // like grad
};

// Each launcher wants so many bytes of device memory, aligned to 256, that need not survive the call.
size_t scratch_bytes(const LossJob& job);
size_t scratch_bytes(const SortJob& job);

// Enqueue the work of a job on a stream of the current device: no allocation, no synchronization.
cudaError_t run_loss(const LossJob& job, void* scratch, cudaStream_t stream);
cudaError_t run_sort(const SortJob& job, void* scratch, cudaStream_t stream);
cudaError_t run_scale(const ScaleJob& job, cudaStream_t stream);

}  // namespace cuda
}  // namespace sortkd
