// The ops below autograd, as C++ functions: what autograd.cpp calls and ops.cpp registers.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace sortkd {

// The arguments of the schema between the tensors and the flags, in its order.
struct LossConfig {
  double temperature;
  int64_t correction;
  bool decoupled;
  double kd_weight, alpha, beta, ce_weight;
  bool standardize, uniform_tail;
  int64_t class_dim, reduction, ignore_index;
  bool parts;
};

using OptionalTensor = std::optional<at::Tensor>;

struct LossTensors {
  at::Tensor student, teacher;
  OptionalTensor teacher_indices;
  at::Tensor target;
  OptionalTensor temperature;
};

// What the loss is to be differentiated by, and where the gradient goes.
struct GradRequest {
  bool student = false;
  bool temperature = false;
  bool inplace = false;     // over the student's own storage
  OptionalTensor upstream;  // multiplied in before the one rounding
};

struct LossResult {
  at::Tensor loss, kd, ce, rank, grad_student, grad_temperature;
};

// The kernel of the op `sort_kd_forward` on the CPU.
LossResult forward_cpu(const LossTensors& tensors, const LossConfig& config, const GradRequest& request);

at::Tensor sort_logits_cpu(const at::Tensor& teacher, const at::Tensor& target, int64_t correction, int64_t ignore_index);

// The same through the dispatcher: any device, and tensors that only stand for values (torch.compile).
LossResult forward(const LossTensors& tensors, const LossConfig& config, const GradRequest& request);

// With gradients (autograd.cpp).
LossResult loss(const LossTensors& tensors, const LossConfig& config, bool inplace);

}  // namespace sortkd
