// The compiled ops under the schemas of sortkd_kernels/ops.py, and the module with the loss for tensors with values.
#include "ops.h"

#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "kernels.h"

#if defined(SORTKD_SIMT)
#include "cuda/choices.h"
#endif

// The harness registers the device's code under a name of its own, beside the package's.
#if defined(SORTKD_SIMT)
#define SORTKD_LIBRARY sortkd_simt
#define SORTKD_MODULE sortkd_simt
#else
#define SORTKD_LIBRARY sortkd_kernels
#define SORTKD_MODULE _C
#endif
// PyTorch's macro pastes its argument as it stands; through this one it is expanded first.
#define SORTKD_IMPLEMENT(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)

namespace pybind11::detail {

// LossConfig, a NamedTuple of Python.
template <>
struct type_caster<sortkd::LossConfig> {
  PYBIND11_TYPE_CASTER(sortkd::LossConfig, const_name("LossConfig"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr())) return false;
    Py_ssize_t i = 0;
    sortkd::for_each_field(value, [&](auto& field) {
      using Field = std::decay_t<decltype(field)>;
      const handle item = PyTuple_GetItem(source.ptr(), i++);
      if (!item) throw error_already_set();
      if constexpr (std::is_enum_v<Field>)
        field = static_cast<Field>(item.cast<int64_t>());
      else
        field = item.cast<Field>();
    });
    return i == PyTuple_GET_SIZE(source.ptr());
  }
};
}  // namespace pybind11::detail

namespace sortkd {
namespace {

// An op's outputs must be tensors: a part that nobody asked for is an empty one.
at::Tensor defined_or_empty(const at::Tensor& t, const at::Tensor& like, at::ScalarType dtype) {
  return t.defined() ? t : at::empty({0}, like.options().dtype(dtype));
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Outputs outputs_of(const LossResult& r, const at::Tensor& student) {
  const auto acc = r.loss.scalar_type();
  return {r.loss,
          defined_or_empty(r.kd, r.loss, acc),
          defined_or_empty(r.ce, r.loss, acc),
          defined_or_empty(r.rank, r.loss, at::kInt),
          defined_or_empty(r.grad_student, student, student.scalar_type()),
          defined_or_empty(r.grad_temperature, r.loss, acc)};
}

// The op for tensors with values, which may also write over the student.
Outputs loss_forward(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& teacher_indices,
                     const at::Tensor& target, const OptionalTensor& temperature, const LossConfig& config,
                     const OptionalTensor& grad_output, bool grad_student, bool grad_temperature, bool inplace) {
  const LossTensors tensors{student, teacher, teacher_indices, target, temperature, std::nullopt};
  return outputs_of(forward(tensors, config, {grad_output, grad_student, grad_temperature, inplace}), student);
}

// The arguments of the schema from the dispatcher's stack, from the last to the first.
void sort_kd_forward(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size()).vec();
  size_t next = 0;
  const auto take = [&]() -> const c10::IValue& { return arguments[next++]; };
  const auto optional = [&] { return take().toOptional<at::Tensor>(); };
  LossTensors t;
  t.student = take().toTensor();
  t.teacher = take().toTensor();
  t.teacher_indices = optional();
  t.target = take().toTensor();
  t.temperature = optional();
  LossConfig config;
  for_each_field(config, [&](auto& field) {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_enum_v<Field>)
      field = static_cast<Field>(take().toInt());
    else
      field = take().to<Field>();
  });
  GradRequest request;
  request.grad_output = optional();
  request.student = take().toBool();
  request.temperature = take().toBool();
  const Outputs outputs = outputs_of(forward(t, config, request), t.student);
  torch::jit::drop(*stack, arguments.size());
  std::apply([&](const auto&... output) { torch::jit::push(*stack, output...); }, outputs);
}

at::Tensor sort_logits_op(const at::Tensor& teacher, const at::Tensor& target, int64_t correction, int64_t ignore_index) {
  return sort_logits(teacher, target, static_cast<Correction>(correction), ignore_index);
}

}  // namespace

SORTKD_IMPLEMENT(SORTKD_LIBRARY, CPU, m) {
  m.impl("sort_kd_forward", torch::CppFunction::makeFromBoxedFunction<&sort_kd_forward>());
  m.impl("sort_logits", &sort_logits_op);
}
#if defined(SORTKD_CUDA)
SORTKD_IMPLEMENT(SORTKD_LIBRARY, CUDA, m) {
  m.impl("sort_kd_forward", torch::CppFunction::makeFromBoxedFunction<&sort_kd_forward>());
  m.impl("sort_logits", &sort_logits_op);
}
#endif

}  // namespace sortkd

PYBIND11_MODULE(SORTKD_MODULE, module) {
  module.doc() = "The compiled part of sortkd_kernels; importing it registers the kernels of the ops.";
  module.def("eager_loss", &sortkd::eager_loss);
  module.def("loss_forward", &sortkd::loss_forward);
#if defined(SORTKD_SIMT)
  // Tests reach every code path with small rows.
  module.def("set_choices", [](int lanes, int threads, int cluster, int from_memory, int list_room, int long_room, int blocks) {
    sortkd::cuda::overrides = {lanes, threads, cluster, from_memory, list_room, long_room, blocks};
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
