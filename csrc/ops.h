// The ops as C++ functions on tensors: forward.cpp computes, autograd.cpp differentiates, ops.cpp registers.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "loss_config.h"

namespace sortkd {

using OptionalTensor = std::optional<at::Tensor>;

// Logits [..., C], row tensors [...].
struct LossTensors {
  at::Tensor student, teacher;
  OptionalTensor teacher_indices;
  at::Tensor target;
  OptionalTensor temperature;
  OptionalTensor row_scale;  // multiplies each row's loss and gradient before the reduction, which is then a sum or none
};

// Which gradients are wanted, and where the student's goes.
struct GradRequest {
  OptionalTensor grad_output;  // multiplied in before the one rounding; not beside a row_scale
  bool student = false;
  bool temperature = false;
  bool inplace = false;  // over the student's own storage
};

// What was not asked for is undefined. The student's gradient has the strides of at::empty_like(student).
struct LossResult {
  at::Tensor loss, kd, ce, rank, grad_student, grad_temperature;
};

// The test harness runs the CUDA kernels on CPU tensors, in place of the CPU's own.
#if defined(SORTKD_SIMT)
constexpr auto kCudaKernelsOn = c10::DeviceType::CPU;
#else
constexpr auto kCudaKernelsOn = c10::DeviceType::CUDA;
#endif

LossResult forward(const LossTensors& tensors, const LossConfig& config, const GradRequest& request);
at::Tensor sort_logits(const at::Tensor& teacher, const at::Tensor& target, Correction correction, int64_t ignore_index);

// The student's gradient times the loss's own, a scalar or one value a row; in place unless `keep`.
at::Tensor scale_gradient(const at::Tensor& grad, const at::Tensor& grad_output, bool keep);

// (loss, kd, ce, rank) with autograd around forward(), past the dispatcher, whose argument parser costs more than the kernel at
// 64 x 100. Nothing where the student has no values to be read: in a trace, under a transform or a mode that wants to see ops.
using LossOutput = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
std::optional<LossOutput> eager_loss(const at::Tensor& student, const at::Tensor& teacher,
                                     const OptionalTensor& teacher_indices, const at::Tensor& target,
                                     const OptionalTensor& temperature, const OptionalTensor& row_scale,
                                     const LossConfig& config, bool inplace);

}  // namespace sortkd
