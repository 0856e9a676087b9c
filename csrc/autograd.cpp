// Autograd of tensors with values: the gradient is made in the forward pass and only rescaled in the backward one.
// sortkd_kernels/autograd.py has the same formula for traces and for the Triton kernels.
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

bool keeps_graph() { return torch::autograd::get_current_graph_task_keep_graph(); }

// An input of the forward pass that the backward pass reads. Autograd notices where it has been overwritten meanwhile, save for
// a tensor of torch.inference_mode(), which it refuses to save.
class SavedInput {
 public:
  SavedInput() = default;
  explicit SavedInput(const at::Tensor& t) {
    if (t.defined() && t.is_inference())
      unversioned_ = t;
    else
      saved_ = SavedVariable(t, false);
  }
  at::Tensor unpack() const { return unversioned_.defined() ? unversioned_ : saved_.unpack(); }
  void reset() { unversioned_.reset(), saved_.reset_data(); }

 private:
  SavedVariable saved_;
  at::Tensor unversioned_;
};

struct SortKdBackward : torch::autograd::Node {
  LossConfig config;
  GradRequest request;
  bool in_backward = false;  // the student's gradient is still to be made
  SavedVariable grad_student, grad_temperature;
  SavedInput student, teacher, teacher_indices, target, temperature, row_scale;

  std::string name() const override { return "SortKdBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(2);
    const at::Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return result;
    {
      const at::NoGradGuard no_grad;
      if (request.student && task_should_compute_output(0))
        result[0] = in_backward ? made_now(grad_output) : scale_gradient(grad_student.unpack(), grad_output, keeps_graph());
      if (request.temperature && task_should_compute_output(1)) result[1] = of_temperature(grad_output);
    }
    if (at::GradMode::is_enabled()) refuse_second_derivative(result);
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    grad_student.reset_data(), grad_temperature.reset_data();
    for (SavedInput* input : {&student, &teacher, &teacher_indices, &target, &temperature, &row_scale}) input->reset();
  }

 private:
  at::Tensor made_now(const at::Tensor& grad_output) {
    const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t.detach()) : std::nullopt; };
    const LossTensors tensors{student.unpack().detach(),          teacher.unpack(),
                              optional(teacher_indices.unpack()), target.unpack(),
                              optional(temperature.unpack()),     std::nullopt};
    const bool inplace = request.inplace && !keeps_graph();
    // An op before this one may have saved these logits: it must see that they are gone.
    if (inplace) student.unpack().unsafeGetTensorImpl()->bump_version();
    const at::Tensor scale = row_scale.unpack();
    return forward(tensors, config, {scale.defined() ? grad_output * scale : grad_output, true, false, inplace}).grad_student;
  }

  at::Tensor of_temperature(const at::Tensor& grad_output) {
    const at::Tensor t = temperature.unpack();
    const at::Tensor rows = grad_temperature.unpack() * grad_output.reshape({-1});
    return (t.dim() ? rows.view(t.sizes()) : rows.sum()).to(t.scalar_type());
  }

  // The results do depend on the student, but nobody wrote that derivative: whoever asks for it gets an error.
  void refuse_second_derivative(variable_list& grads) {
    for (at::Tensor& grad : grads) {
      if (!grad.defined()) continue;
      torch::autograd::edge_list edges = next_edges();
      grad = grad.detach();
      torch::autograd::set_history(
          grad, make_node<torch::autograd::Error>("sortkd_kernels: second derivatives of the fused losses are not implemented; "
                                                  "backend=\"reference\" has them",
                                                  std::move(edges)));
    }
  }
};

LossOutput output_of(const LossResult& r) { return {r.loss, r.kd, r.ce, r.rank}; }

// Whether all of them have the values that their memory holds, and no mode wants to see the ops.
bool is_eager(const LossTensors& tensors) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
  c10::DispatchKeySet keys = tensors.student.key_set() | tensors.teacher.key_set() | tensors.target.key_set();
  for (const OptionalTensor& t : {tensors.teacher_indices, tensors.temperature, tensors.row_scale})
    if (t) keys = keys | t->key_set();
  constexpr c10::DispatchKeySet observed(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::Negative});
  return !keys.has_any(observed) && !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Python);
}

}  // namespace

std::optional<LossOutput> eager_loss(const at::Tensor& student, const at::Tensor& teacher,
                                     const OptionalTensor& teacher_indices, const at::Tensor& target,
                                     const OptionalTensor& temperature, const OptionalTensor& row_scale,
                                     const LossConfig& config, bool inplace) {
  const LossTensors tensors{student, teacher, teacher_indices, target, temperature, row_scale};
  if (!is_eager(tensors)) return std::nullopt;
  const at::Tensor learned = temperature.value_or(at::Tensor());
  for (const at::Tensor& t : {student, learned})
    TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(0).defined(),
                                "sortkd_kernels: forward-mode derivatives of the fused losses are not implemented; "
                                "backend=\"reference\" has them");
  const bool grads = at::GradMode::is_enabled();
  GradRequest request;
  request.student = grads && student.requires_grad();
  request.temperature = grads && learned.defined() && learned.requires_grad();
  if (!request.student && !request.temperature) return output_of(forward(tensors, config, request));
  request.inplace = inplace && request.student;

  auto node = make_node<SortKdBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(student, learned));
  node->config = config;
  node->config.parts = false;
  node->request = request;
  node->in_backward = request.student && student.scalar_type() == at::kHalf;
  if (node->in_backward) request.student = request.inplace = false;
  LossResult result;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    result = forward(tensors, config, request);
    if (request.inplace) student.unsafeGetTensorImpl()->bump_version();
  }
  torch::autograd::set_history(result.loss, node);
  if (request.student) node->grad_student = SavedVariable(result.grad_student, false);
  if (request.temperature) node->grad_temperature = SavedVariable(result.grad_temperature, false);
  if (request.temperature || node->in_backward) node->temperature = SavedInput(learned);
  if (node->in_backward) {
    node->student = SavedInput(student);
    node->teacher = SavedInput(teacher);
    node->target = SavedInput(target);
    if (teacher_indices) node->teacher_indices = SavedInput(*teacher_indices);
    if (row_scale) node->row_scale = SavedInput(*row_scale);
  }
  return output_of(result);
}

}  // namespace sortkd
