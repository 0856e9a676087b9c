// The one description of a loss: its options, the same for every row of a call. No headers of PyTorch, so that CUDA sources
// compile without them.
#pragma once

#include <cstdint>
#include <optional>

namespace sortkd {

enum class Correction : int64_t { None = 0, Sort = 1, Swap = 2 };
enum class Reduction : int64_t { None = 0, Sum = 1, Mean = 2 };
enum class Tail : int64_t { Renormalize = 0, Uniform = 1, Bucket = 2 };

// Fields, their order and their meaning are those of LossConfig in sortkd_kernels/ops.py.
struct LossConfig {
  double temperature;  // of every row, where no tensor holds it
  Correction correction;
  double kd_weight, alpha;
  std::optional<double> beta;  // DKD where it is given, KD otherwise
  double ce_weight;
  bool standardize;  // LSKD's z-score of both sides
  Tail tail;         // of a top-k teacher: what stands for the absent classes
  Reduction reduction;
  int64_t ignore_index;
  bool parts;  // the terms and the rank are wanted beside the loss

  bool decoupled() const { return beta.has_value(); }
  bool with_ce() const { return ce_weight != 0 || parts; }
  // One class beside the label is no distribution to match: without this, NCKD would be the rounding of 0.
  double beta_of(int64_t C) const { return C > 2 ? beta.value_or(0) : 0; }
};

// f(field) for each, in order: how a config crosses the dispatcher's stack and Python's tuple.
template <typename Config, typename F>
void for_each_field(Config& c, F&& f) {
  f(c.temperature), f(c.correction), f(c.kd_weight), f(c.alpha), f(c.beta), f(c.ce_weight), f(c.standardize);
  f(c.tail), f(c.reduction), f(c.ignore_index), f(c.parts);
}

}  // namespace sortkd
