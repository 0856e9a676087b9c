// Schemas, registrations, and the module with the build's facts. sortkd_kernels/ops.py has the fake kernels.
#include "ops.h"

#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#if defined(SORTKD_SIMT)
#include "cuda/choices.h"
#else
#include "launch.h"
#endif

// The harness registers the device's code under a name of its own, beside the package's.
#if defined(SORTKD_SIMT)
#define SORTKD_LIBRARY sortkd_simt
#define SORTKD_MODULE sortkd_simt
#else
#define SORTKD_LIBRARY sortkd_kernels
#define SORTKD_MODULE _C
#endif
// PyTorch's macros paste their argument as it stands; through these it is expanded first.
#define SORTKD_DEFINE(library, m) TORCH_LIBRARY(library, m)
#define SORTKD_IMPLEMENT(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)

namespace sortkd {
namespace {

#define SORTKD_CONFIG_SCHEMA                                                                                     \
  "float temperature, int correction, bool decoupled, float kd_weight, float alpha, float beta, float ce_weight, " \
  "bool standardize, bool uniform_tail, int class_dim, int reduction, int ignore_index"
#define SORTKD_TENSORS_SCHEMA \
  "Tensor student, Tensor teacher, Tensor? teacher_indices, Tensor target, Tensor? temperature_tensor"

// An op's outputs must be tensors; a part that nobody asked for is an empty one.
at::Tensor defined_or_empty(const at::Tensor& t, const at::Tensor& like, at::ScalarType dtype) {
  return t.defined() ? t : at::empty({0}, like.options().dtype(dtype));
}

using ForwardOutput = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardOutput sort_kd_forward(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& teacher_indices,
                              const at::Tensor& target, const OptionalTensor& temperature_tensor, double temperature,
                              int64_t correction, bool decoupled, double kd_weight, double alpha, double beta,
                              double ce_weight, bool standardize, bool uniform_tail, int64_t class_dim, int64_t reduction,
                              int64_t ignore_index, bool parts, const OptionalTensor& upstream, bool grad_student,
                              bool grad_temperature) {
  auto r = forward_on_device({student, teacher, teacher_indices, target, temperature_tensor},
                       {temperature, correction, decoupled, kd_weight, alpha, beta, ce_weight, standardize, uniform_tail,
                        class_dim, reduction, ignore_index, parts},
                       {grad_student, grad_temperature, false, upstream});
  const auto dtype = r.loss.scalar_type();
  return {r.loss,
          defined_or_empty(r.kd, r.loss, dtype),
          defined_or_empty(r.ce, r.loss, dtype),
          defined_or_empty(r.rank, r.loss, at::kInt),
          defined_or_empty(r.grad_student, student, student.scalar_type()),
          defined_or_empty(r.grad_temperature, r.loss, dtype)};
}

using LossOutput = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LossOutput sort_kd_loss(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& teacher_indices,
                        const at::Tensor& target, const OptionalTensor& temperature_tensor, double temperature,
                        int64_t correction, bool decoupled, double kd_weight, double alpha, double beta, double ce_weight,
                        bool standardize, bool uniform_tail, int64_t class_dim, int64_t reduction, int64_t ignore_index,
                        bool parts, bool inplace) {
  auto r = loss({student, teacher, teacher_indices, target, temperature_tensor},
                {temperature, correction, decoupled, kd_weight, alpha, beta, ce_weight, standardize, uniform_tail,
                 class_dim, reduction, ignore_index, parts},
                inplace);
  return {r.loss, r.kd, r.ce, r.rank};
}

LossOutput sort_kd_loss_op(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& teacher_indices,
                           const at::Tensor& target, const OptionalTensor& temperature_tensor, double temperature,
                           int64_t correction, bool decoupled, double kd_weight, double alpha, double beta,
                           double ce_weight, bool standardize, bool uniform_tail, int64_t class_dim, int64_t reduction,
                           int64_t ignore_index, bool parts, bool inplace) {
  auto [loss, kd, ce, rank] =
      sort_kd_loss(student, teacher, teacher_indices, target, temperature_tensor, temperature, correction, decoupled,
                   kd_weight, alpha, beta, ce_weight, standardize, uniform_tail, class_dim, reduction, ignore_index, parts,
                   inplace);
  const auto dtype = loss.scalar_type();
  return {loss, defined_or_empty(kd, loss, dtype), defined_or_empty(ce, loss, dtype),
          defined_or_empty(rank, loss, at::kInt)};
}

at::Tensor sort_logits(const at::Tensor& teacher, const at::Tensor& target, int64_t correction, int64_t ignore_index) {
#if defined(SORTKD_SIMT) || defined(SORTKD_CUDA)
  if (kernels_for(teacher) == Kernels::Cuda) return sort_logits_cuda(teacher, target, correction, ignore_index);
#endif
#if !defined(SORTKD_SIMT)
  return sort_logits_cpu(teacher, target, correction, ignore_index);
#endif
}

}  // namespace

LossResult forward_on_device(const LossTensors& tensors, const LossConfig& config, const GradRequest& request) {
#if defined(SORTKD_SIMT) || defined(SORTKD_CUDA)
  if (kernels_for(tensors.student) == Kernels::Cuda) return forward_cuda(tensors, config, request);
#endif
#if !defined(SORTKD_SIMT)
  return forward_cpu(tensors, config, request);
#endif
}

LossResult forward(const LossTensors& t, const LossConfig& c, const GradRequest& request) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(C10_STRINGIZE(SORTKD_LIBRARY) "::sort_kd_forward", "")
                             .typed<decltype(sort_kd_forward)>();
  auto [loss, kd, ce, rank, grad_student, grad_temperature] = op.call(
      t.student, t.teacher, t.teacher_indices, t.target, t.temperature, c.temperature, c.correction, c.decoupled,
      c.kd_weight, c.alpha, c.beta, c.ce_weight, c.standardize, c.uniform_tail, c.class_dim, c.reduction, c.ignore_index,
      c.parts, request.upstream, request.student, request.temperature);
  return {loss, kd, ce, rank, grad_student, grad_temperature};
}

SORTKD_DEFINE(SORTKD_LIBRARY, m) {
  m.def("sort_kd_loss(" SORTKD_TENSORS_SCHEMA ", " SORTKD_CONFIG_SCHEMA
        ", bool parts, bool inplace) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sort_kd_forward(" SORTKD_TENSORS_SCHEMA ", " SORTKD_CONFIG_SCHEMA
        ", bool parts, Tensor? upstream, bool grad_student, bool grad_temperature)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sort_logits(Tensor teacher, Tensor target, int correction, int ignore_index) -> Tensor");
}

// Composite: autograd.cpp decides by its inputs, and torch.compile traces through to the op below.
SORTKD_IMPLEMENT(SORTKD_LIBRARY, CompositeImplicitAutograd, m) { m.impl("sort_kd_loss", &sort_kd_loss_op); }

SORTKD_IMPLEMENT(SORTKD_LIBRARY, CPU, m) {
  m.impl("sort_kd_forward", &sort_kd_forward);
  m.impl("sort_logits", &sort_logits);
}
#if defined(SORTKD_CUDA)
SORTKD_IMPLEMENT(SORTKD_LIBRARY, CUDA, m) {
  m.impl("sort_kd_forward", &sort_kd_forward);
  m.impl("sort_logits", &sort_logits);
}
#endif

}  // namespace sortkd

PYBIND11_MODULE(SORTKD_MODULE, module) {
  module.doc() = "The compiled part of sortkd_kernels; importing it registers the ops.";
  // The op without the dispatcher's argument parser, which costs more than the kernel at 64 x 100.
  module.def("sort_kd_loss", &sortkd::sort_kd_loss);
#if defined(SORTKD_SIMT)
  // Tests reach every code path with small rows.
  module.def("set_choices", [](int tile_group, int stream_threads, int on_chip, int settled, int entries, int blocks) {
    sortkd::cuda::overrides = {tile_group, stream_threads, on_chip, settled, entries, blocks};
  });
#else
  module.def("build_info", [] {
    pybind11::dict info;
    info["cpu_capability"] = sortkd::cpu::capability();
#if defined(SORTKD_X86)
    info["cpu_capabilities"] = pybind11::make_tuple("baseline", "avx2", "avx512");
#else
    info["cpu_capabilities"] = pybind11::make_tuple("baseline");
#endif
#if defined(SORTKD_CUDA)
    pybind11::list architectures;
    for (int architecture : {SORTKD_CUDA}) architectures.append("sm_" + std::to_string(architecture));
    info["cuda"] = pybind11::tuple(architectures);
#else
    info["cuda"] = false;
#endif
    info["compiler"] = __VERSION__;
    return info;
  });
#endif
}
