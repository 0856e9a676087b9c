// Autograd in C++: the gradient is made in the forward pass and only rescaled in the backward one.
//
// float16 students are the exception: a probability of 1e-8 is 0 in float16, and a gradient scaler multiplies by 2^16 only in
// the backward pass. Their gradient is made there, by the same kernel, with the scale multiplied in before the rounding.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/version.h>

#include "ops.h"

namespace sortkd {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch 2.14 counts the references of a node in the node itself.
template <typename N, typename... Args>
auto make_node(Args&&... args) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
  return c10::make_intrusive<N>(std::forward<Args>(args)...);
#else
  return std::shared_ptr<N>(new N(std::forward<Args>(args)...), torch::autograd::deleteNode);
#endif
}

// A tensor with memory of its own on a device with kernels, outside any trace: no subclass, no mode that wants to see the ops.
bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet observed({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return kernels_for(t) != Kernels::None && !t.key_set().has_any(observed) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Python);
}

LossResult run(const LossTensors& tensors, const LossConfig& config, const GradRequest& request) {
  // The direct call saves a round through the dispatcher, which 64 x 100 logits feel.
  return is_plain(tensors.student) ? forward_on_device(tensors, config, request) : forward(tensors, config, request);
}

bool is_one(const at::Tensor& scalar) {
  return scalar.dim() == 0 && scalar.scalar_type() == at::kFloat ? *scalar.const_data_ptr<float>() == 1.0f
                                                                : scalar.dim() == 0 && scalar.item<double>() == 1.0;
}

// The gradient of a loss of upstream gradient `upstream`: a scalar, or one value a row.
at::Tensor scaled(const at::Tensor& grad, const at::Tensor& upstream, const LossConfig& config) {
  const bool plain = is_plain(grad) && is_plain(upstream);
  const bool keep = torch::autograd::get_current_graph_task_keep_graph();
#if defined(SORTKD_SIMT) || defined(SORTKD_CUDA)
  // The kernel looks at the scalar itself: the host would have to wait for it.
  if (plain && kernels_for(grad) == Kernels::Cuda) return scale_cuda(grad, upstream, config.class_dim, keep);
#endif
  if (plain && is_one(upstream)) return keep ? grad.clone() : grad;
  const int64_t class_dim = config.class_dim < 0 ? config.class_dim + grad.dim() : config.class_dim;
  const at::Tensor factor = upstream.dim() ? upstream.unsqueeze(class_dim) : upstream;
  if (!plain || keep) return (grad * factor).to(grad.scalar_type());
  // Nobody reads the buffer again. A half buffer times float rows would be widened whole: a block at a time is not.
  at::Tensor result = grad;
  const int64_t rows = grad.size(0);
  if (!upstream.dim() || class_dim == 0 || factor.scalar_type() == grad.scalar_type()) return result.mul_(factor);
  const int64_t step = std::max<int64_t>(1, rows / 64);
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    result.narrow(0, row, count).mul_(factor.narrow(0, row, count));
  }
  return result;
}

struct SortKdBackward : torch::autograd::Node {
  LossConfig config;
  GradRequest request;
  bool in_backward = false;  // the student's gradient is still to be made
  SavedVariable grad_student, grad_temperature, temperature;
  SavedVariable student, teacher, teacher_indices, target;

  std::string name() const override { return "SortKdBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(2);
    const at::Tensor& upstream = grads[0];
    if (!upstream.defined()) return result;
    {
      const at::NoGradGuard no_grad;
      if (request.student && task_should_compute_output(0))
        result[0] = in_backward ? recomputed(upstream) : scaled(grad_student.unpack(), upstream, config);
      if (request.temperature && task_should_compute_output(1)) result[1] = of_temperature(upstream);
    }
    if (at::GradMode::is_enabled()) refuse_second_derivative(result);
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved :
         {&grad_student, &grad_temperature, &temperature, &student, &teacher, &teacher_indices, &target})
      saved->reset_data();
  }

 private:
  at::Tensor recomputed(const at::Tensor& upstream) {
    LossTensors tensors{student.unpack(), teacher.unpack(), std::nullopt, target.unpack(), std::nullopt};
    if (const at::Tensor indices = teacher_indices.unpack(); indices.defined()) tensors.teacher_indices = indices;
    if (const at::Tensor t = temperature.unpack(); t.defined()) tensors.temperature = t.detach();
    GradRequest now{true, false, false, upstream};
    now.inplace = request.inplace && !torch::autograd::get_current_graph_task_keep_graph();
    // An op before this one may have saved these logits: it must see that they are gone.
    if (now.inplace) tensors.student.unsafeGetTensorImpl()->bump_version();
    return run(tensors, config, now).grad_student;
  }

  at::Tensor of_temperature(const at::Tensor& upstream) {
    const at::Tensor t = temperature.unpack();
    const at::Tensor rows = grad_temperature.unpack() * upstream.reshape({-1});
    return (t.dim() ? rows.view(t.sizes()) : rows.sum()).to(t.scalar_type());
  }

  // The results do depend on the student, but nobody wrote that derivative: whoever asks for it gets an error.
  void refuse_second_derivative(variable_list& grads) {
    for (at::Tensor& grad : grads) {
      if (!grad.defined()) continue;
      torch::autograd::edge_list edges = next_edges();
      grad = grad.detach();
      torch::autograd::set_history(
          grad, make_node<torch::autograd::Error>(
                    "sortkd_kernels: second derivatives of the fused losses are not implemented; "
                    "backend=\"reference\" has them",
                    std::move(edges)));
    }
  }
};

void check_inplace(const at::Tensor& student) {
  TORCH_CHECK_VALUE(student.is_contiguous(),
                    "sortkd_kernels: expected a contiguous student with inplace=True, since the gradient is written over "
                    "it, got strides ", student.strides());
  TORCH_CHECK_VALUE(!student.is_leaf(),
                    "sortkd_kernels: expected logits that a model computed with inplace=True, got a leaf tensor that "
                    "requires grad, whose values would be lost; pass inplace=False");
}

}  // namespace

LossResult loss(const LossTensors& tensors, const LossConfig& config, bool inplace) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
  for (const at::Tensor& t : {tensors.student, tensors.temperature.value_or(at::Tensor())})
    TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(0).defined(),
                                "sortkd_kernels: forward-mode derivatives of the fused losses are not implemented; "
                                "backend=\"reference\" has them");
  const bool grads = at::GradMode::is_enabled();
  GradRequest request;
  request.student = grads && tensors.student.requires_grad();
  request.temperature = grads && tensors.temperature && tensors.temperature->requires_grad();
  if (!request.student && !request.temperature) return run(tensors, config, request);
  if (inplace && request.student) check_inplace(tensors.student);
  // In a trace the compiler plans the memory itself, and the permission is not used.
  request.inplace = inplace && is_plain(tensors.student);

  const bool in_backward = request.student && tensors.student.scalar_type() == at::kHalf;
  GradRequest now = request;
  now.student = request.student && !in_backward;
  const at::Tensor temperature = tensors.temperature.value_or(at::Tensor());
  auto node = make_node<SortKdBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(tensors.student, temperature));
  node->config = config;
  node->config.parts = false;
  node->request = request;
  node->in_backward = in_backward;
  LossResult result;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    result = run(tensors, config, now);
    if (now.inplace && now.student) tensors.student.unsafeGetTensorImpl()->bump_version();
  }
  torch::autograd::set_history(result.loss, node);
  if (now.student) node->grad_student = SavedVariable(result.grad_student, false);
  if (request.temperature) {
    node->grad_temperature = SavedVariable(result.grad_temperature, false);
    node->temperature = SavedVariable(temperature, false);
  }
  if (in_backward) {
    node->student = SavedVariable(tensors.student, false);
    node->teacher = SavedVariable(tensors.teacher, false);
    node->target = SavedVariable(tensors.target, false);
    node->temperature = SavedVariable(temperature, false);
    if (tensors.teacher_indices) node->teacher_indices = SavedVariable(*tensors.teacher_indices, false);
  }
  return result;
}

}  // namespace sortkd
