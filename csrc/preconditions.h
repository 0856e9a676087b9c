// Memory-safety guards of the ops, called once an op. The user's contract, with its friendlier words, is in
// sortkd_kernels/checks.py; these hold for callers who reach the ops another way.
#pragma once

#include <ATen/ATen.h>

namespace sortkd {

inline bool is_float_dtype(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline void check_logits(const at::Tensor& logits, const char* name, int64_t class_dim) {
  TORCH_CHECK_TYPE(is_float_dtype(logits), "sortkd_kernels: expected ", name,
                   " of a float dtype, got ", logits.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() > 0 && class_dim >= 0 && class_dim < logits.dim() && logits.size(class_dim) > 0,
                    "sortkd_kernels: expected ", name, " with at least one class in dimension ", class_dim, ", got shape ",
                    logits.sizes());
}

inline void check_row_tensor(const at::Tensor& rows, const char* name, const at::Tensor& logits, int64_t class_dim) {
  auto expected = logits.sizes().vec();
  expected.erase(expected.begin() + class_dim);
  TORCH_CHECK_VALUE(rows.sizes().equals(expected), "sortkd_kernels: expected ", name, " of shape ", expected, ", got ",
                    rows.sizes());
  TORCH_CHECK_VALUE(rows.device() == logits.device(), "sortkd_kernels: expected ", name, " on ", logits.device(), ", got ",
                    rows.device());
}

// Labels are values: only the CPU may look at them without waiting for a device. Returns how many rows count.
inline int64_t check_labels(const at::Tensor& target, int64_t C, int64_t ignore_index) {
  const int64_t* labels = target.const_data_ptr<int64_t>();
  int64_t counted = 0;
  for (int64_t n = 0; n < target.numel(); ++n) {
    if (labels[n] == ignore_index) continue;
    TORCH_CHECK_INDEX(labels[n] >= 0 && labels[n] < C, "sortkd_kernels: expected target in [0, ", C, ") or ignore_index ", ignore_index,
                      ", got ", labels[n], " in row ", n);
    ++counted;
  }
  return counted;
}

// Indices of a top-k teacher, [N, k].
inline void check_top_k_shapes(const at::Tensor& indices, const at::Tensor& values, int64_t N, int64_t C) {
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, "sortkd_kernels: expected teacher_indices of dtype int64");
  TORCH_CHECK_VALUE(indices.sizes().equals(values.sizes()) && indices.dim() > 0 &&
                        indices.numel() == N * indices.size(-1) && indices.size(-1) <= C,
                    "sortkd_kernels: expected teacher values and indices of one shape [..., k] with k <= ", C, ", got ",
                    values.sizes(), " and ", indices.sizes());
}

// The same, and on the CPU that they are in [0, C).
inline void check_top_k(const at::Tensor& indices, const at::Tensor& values, int64_t N, int64_t C) {
  check_top_k_shapes(indices, values, N, C);
  const int64_t* data = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < indices.numel(); ++i)
    TORCH_CHECK_INDEX(data[i] >= 0 && data[i] < C, "sortkd_kernels: expected teacher_indices in [0, ", C, "), got ", data[i]);
}

}  // namespace sortkd
