// What the kernels of both devices are told about a call: its rows, its loss, and how rows become a result. No headers
// of PyTorch, so that CUDA sources compile without them.
#pragma once

#include <cstdint>

namespace sortkd {

enum class Correction : int64_t { None = 0, Sort = 1, Swap = 2 };
enum class Reduction : int64_t { None = 0, Sum = 1, Mean = 2 };

// Rows and their classes, as a tensor of any class_dim has them.
struct Layout {
  int64_t outer;
  int64_t C;
  int64_t inner;
  int64_t rows() const { return outer * inner; }
};

// The weights and switches of a row's loss; the same for all rows of a call.
struct LossOptions {
  Correction correction;
  bool decoupled;    // DKD instead of KD
  bool standardize;  // LSKD's z-score on both sides
  bool want_ce;      // the cross-entropy is asked for: weighted, or as a part
  bool uniform_tail; // top-k teachers: spread the mass outside the k evenly
  double kd_weight, alpha, beta, ce_weight;
};

}  // namespace sortkd
