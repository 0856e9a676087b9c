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

// The kernels behind the ops, and for CUDA what multiplies a gradient by what comes from above, in place unless `keep`.
LossResult forward_cpu(const LossTensors& tensors, const LossConfig& config, const GradRequest& request);
LossResult forward_cuda(const LossTensors& tensors, const LossConfig& config, const GradRequest& request);
at::Tensor sort_logits_cpu(const at::Tensor& teacher, const at::Tensor& target, int64_t correction,
                           int64_t ignore_index);
at::Tensor sort_logits_cuda(const at::Tensor& teacher, const at::Tensor& target, int64_t correction,
                            int64_t ignore_index);
at::Tensor scale_cuda(const at::Tensor& grad, const at::Tensor& upstream, int64_t class_dim, bool keep);

// Which of them a tensor takes. SORTKD_SIMT is the test harness, which runs the device's code on CPU tensors.
enum class Kernels { None, Cpu, Cuda };
inline Kernels kernels_for(const at::Tensor& t) {
#if defined(SORTKD_SIMT)
  return t.is_cpu() ? Kernels::Cuda : Kernels::None;
#elif defined(SORTKD_CUDA)
  return t.is_cpu() ? Kernels::Cpu : t.is_cuda() ? Kernels::Cuda : Kernels::None;
#else
  return t.is_cpu() ? Kernels::Cpu : Kernels::None;
#endif
}

// The kernel of the op `sort_kd_forward` for the student's device.
LossResult forward_on_device(const LossTensors& tensors, const LossConfig& config, const GradRequest& request);

// The same through the dispatcher: any device, and tensors that only stand for values (torch.compile).
LossResult forward(const LossTensors& tensors, const LossConfig& config, const GradRequest& request);

// With gradients (autograd.cpp).
LossResult loss(const LossTensors& tensors, const LossConfig& config, bool inplace);

}  // namespace sortkd
