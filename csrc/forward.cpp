// The ops on tensors of either device: checks, the layout of the rows, results; then the device's launcher.
//
// The checks keep memory safe for callers who reach the ops past the public functions. The user's contract, with its friendlier
// words, is in sortkd_kernels/checks.py.
#include <c10/core/DeviceGuard.h>

#include "kernels.h"
#include "ops.h"

#if defined(SORTKD_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sortkd {
namespace {

[[maybe_unused]] bool on_gpu(const at::Tensor& t) { return t.device().type() == kCudaKernelsOn; }

#if defined(SORTKD_CUDA)
void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
#else
[[maybe_unused]] void check_launch(int) {}
[[maybe_unused]] void* current_stream() { return nullptr; }
#endif

Dtype dtype_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::Float;
    case at::kDouble: return Dtype::Double;
    case at::kBFloat16: return Dtype::BFloat16;
    case at::kHalf: return Dtype::Half;
    default: TORCH_CHECK_TYPE(false, "sortkd_kernels: expected ", name, " of a float dtype, got ", t.scalar_type());
  }
}

// The kernels count classes in 32 bits, twice over.
void check_logits(const at::Tensor& logits, const char* name) {
  TORCH_CHECK_VALUE(logits.dim() > 0 && logits.size(-1) > 0 && logits.size(-1) < (int64_t(1) << 30),
                    "sortkd_kernels: expected ", name, " of shape [..., C] with 0 < C < 2^30, got ", logits.sizes());
}

void check_beside(const at::Tensor& t, const char* name, const at::Tensor& logits, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes().equals(shape), "sortkd_kernels: expected ", name, " of shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.device() == logits.device(), "sortkd_kernels: expected ", name, " on ", logits.device(), ", got ",
                    t.device());
  TORCH_CHECK_TYPE(!t.key_set().has(c10::DispatchKey::Python), "sortkd_kernels: expected ", name,
                   " to be a plain tensor, got a subclass whose memory is elsewhere");
}

void check_indices(const at::Tensor& indices, const char* name) {
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, "sortkd_kernels: expected ", name, " of dtype int64, got ",
                   indices.scalar_type());
}

// Logits [..., C] as rows where they lie: one after the other, or, as a view of [N, C, H, W] has them, interleaved with those
// beside them. Nothing where they lie in another way.
std::optional<Layout> layout_of(const at::Tensor& logits) {
  const int64_t C = logits.size(-1), rows = logits.numel() / C;
  if (logits.is_contiguous()) return Layout{rows, C, 1};
  int64_t inner = 1, outer = 1, d = logits.dim() - 2;
  const auto steps = [&](int64_t stride) { return d >= 0 && (logits.size(d) == 1 || logits.stride(d) == stride); };
  for (; steps(inner); --d) inner *= logits.size(d);
  if (C > 1 && logits.stride(-1) != inner) return std::nullopt;
  for (; steps(outer * C * inner); --d) outer *= logits.size(d);
  return d < 0 ? std::optional(Layout{outer, C, inner}) : std::nullopt;
}

// A gradient of many megabytes is a fresh mapping, and touching it page by page costs more than computing it: ask for huge
// pages. The advice is one system call, and nothing where the system does not take it.
at::Tensor empty_logits(const at::Tensor& like) {
  at::Tensor grad = at::empty_like(like);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  if (grad.is_cpu() && grad.nbytes() >= 2 * kHuge) {
    const auto begin = (reinterpret_cast<uintptr_t>(grad.data_ptr()) + kHuge - 1) / kHuge * kHuge;
    const auto end = (reinterpret_cast<uintptr_t>(grad.data_ptr()) + grad.nbytes()) / kHuge * kHuge;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return grad;
}

// A scalar 1 whose value the host has: the gradient that a plain loss.backward() starts from.
bool is_one(const at::Tensor& grad_output) {
  if (!grad_output.is_cpu() || grad_output.dim()) return false;
  // .item() takes a microsecond.
  return grad_output.scalar_type() == at::kFloat ? *grad_output.const_data_ptr<float>() == 1.0f
                                                 : grad_output.item<double>() == 1.0;
}

template <typename Args, typename OnCpu, typename OnGpu>
void launch(const at::Tensor& on, const Args& args, OnCpu&& on_cpu, OnGpu&& on_cuda) {
#if defined(SORTKD_CUDA) || defined(SORTKD_SIMT)
  if (on_gpu(on)) return on_cuda(args);
#endif
#if !defined(SORTKD_SIMT)
  on_cpu(args);
#endif
}

}  // namespace

LossResult forward(const LossTensors& tensors, const LossConfig& config, const GradRequest& request) {
  const at::Tensor &student = tensors.student, &teacher = tensors.teacher, &target = tensors.target;
  check_logits(student, "student");
  const auto rows_shape = student.sizes().slice(0, student.dim() - 1);
  check_beside(target, "target", student, rows_shape);
  check_indices(target, "target");

  LossArgs args{};
  args.config = config;
  args.student_dtype = dtype_of(student, "student");
  args.teacher_dtype = dtype_of(teacher, "teacher");
  const auto acc = student.options().dtype(args.acc_double() ? at::kDouble : at::kFloat);
  const c10::DeviceGuard guard(student.device());

  // Every tensor of logits takes the student's layout; a student without one is copied.
  const std::optional<Layout> in_memory = layout_of(student);
  const at::Tensor s = in_memory ? student : student.contiguous();
  args.layout = in_memory.value_or(Layout{target.numel(), student.size(-1), 1});
  args.student = s.const_data_ptr();

  at::Tensor t, indices;
  // The bucket's teacher brings its rows with the label and the bucket at their end; its kernels leave the sum to us.
  const bool bucket = tensors.teacher_indices && config.tail == Tail::Bucket;
  if (tensors.teacher_indices) {
    auto values_shape = tensors.teacher_indices->sizes().vec(), top_k = values_shape;
    if (!top_k.empty()) top_k.back() = student.size(-1), values_shape.back() += bucket ? 2 : 0;
    TORCH_CHECK_VALUE(student.sizes().equals(top_k) && tensors.teacher_indices->size(-1) <= student.size(-1),
                      "sortkd_kernels: expected teacher_indices of shape [..., k] with k <= ", student.size(-1), ", got ",
                      tensors.teacher_indices->sizes());
    TORCH_CHECK_VALUE(!bucket || config.reduction != Reduction::Mean,
                      "sortkd_kernels: expected reduction none or sum with the bucket, got mean");
    check_beside(teacher, "teacher", student, values_shape);
    check_beside(*tensors.teacher_indices, "teacher_indices", student, tensors.teacher_indices->sizes());
    args.int64_indices = tensors.teacher_indices->scalar_type() == at::kLong;
    if (!args.int64_indices && tensors.teacher_indices->scalar_type() != at::kInt)
      check_indices(*tensors.teacher_indices, "teacher_indices");
    t = teacher.contiguous();
    indices = tensors.teacher_indices->contiguous();
    args.teacher_indices = indices.const_data_ptr();
    args.k = indices.size(-1);
  } else {
    check_beside(teacher, "teacher", student, student.sizes());
    const bool alike = teacher.strides().equals(s.strides()) || (teacher.is_contiguous() && s.is_contiguous());
    t = alike ? teacher : at::empty_like(s, teacher.options()).copy_(teacher);
  }
  args.teacher = t.const_data_ptr();
  const at::Tensor labels = target.contiguous();
  args.target = labels.const_data_ptr<int64_t>();

  const auto as_acc = [&](const OptionalTensor& value, const char* name, const void*& pointer, int64_t& stride) {
    if (!value) return at::Tensor();
    check_beside(*value, name, student, value->dim() ? rows_shape : at::IntArrayRef());
    const at::Tensor converted = value->to(acc.dtype()).contiguous().resolve_neg();
    pointer = converted.const_data_ptr();
    stride = converted.dim() ? 1 : 0;
    return converted;
  };
  const at::Tensor temperatures = as_acc(tensors.temperature, "temperature", args.temperature, args.temperature_stride);
  const OptionalTensor& factor = tensors.row_scale ? tensors.row_scale : request.grad_output;
  const at::Tensor grad_output = as_acc(factor, "grad_output", args.grad_output, args.grad_output_stride);
  if (tensors.row_scale || bucket) args.config.reduction = Reduction::None;

  LossResult result;
  const at::IntArrayRef shape = args.config.reduction == Reduction::None ? target.sizes() : at::IntArrayRef();
  result.loss = at::empty(shape, acc);
  args.loss = result.loss.data_ptr();
  if (config.parts) {
    result.kd = at::empty(shape, acc);
    result.ce = at::empty(shape, acc);
    result.rank = at::empty(target.sizes(), acc.dtype(at::kInt));
    args.kd = result.kd.data_ptr();
    args.ce = result.ce.data_ptr();
    args.rank = result.rank.data_ptr<int32_t>();
  }
  if (request.student) {
    result.grad_student = request.inplace && in_memory ? student : empty_logits(s);
    args.grad_student = result.grad_student.data_ptr();
  }
  if (request.temperature) {
    result.grad_temperature = at::empty({args.layout.rows()}, acc);
    args.grad_temperature = result.grad_temperature.data_ptr();
  }

  const auto scratch_of = [&](size_t bytes) { return at::empty({static_cast<int64_t>(bytes)}, acc.dtype(at::kByte)); };
  launch(
      student, args, [&](const auto& a) { cpu::run_loss(a, scratch_of(cpu::scratch_bytes(a)).data_ptr()); },
      [&](const auto& a) { check_launch(cuda::run_loss(a, scratch_of(cuda::scratch_bytes(a)).data_ptr(), current_stream())); });
  if (tensors.row_scale || bucket)
    for (at::Tensor* term : {&result.loss, &result.kd, &result.ce}) {
      if (term->defined() && tensors.row_scale) *term = *term * grad_output;
      if (term->defined() && config.reduction != Reduction::None) *term = term->sum();
    }
  if (request.student && !in_memory) result.grad_student = at::empty_like(student).copy_(result.grad_student);
  return result;
}

at::Tensor sort_logits(const at::Tensor& teacher, const at::Tensor& target, Correction correction, int64_t ignore_index) {
  check_logits(teacher, "teacher");
  check_beside(target, "target", teacher, teacher.sizes().slice(0, teacher.dim() - 1));
  check_indices(target, "target");
  const c10::DeviceGuard guard(teacher.device());
  const at::Tensor rows = teacher.contiguous(), labels = target.contiguous();
  at::Tensor corrected = empty_logits(rows);
  const SortArgs args{labels.numel(),
                      teacher.size(-1),
                      correction,
                      dtype_of(teacher, "teacher"),
                      rows.const_data_ptr(),
                      labels.const_data_ptr<int64_t>(),
                      ignore_index,
                      corrected.data_ptr()};
  launch(
      teacher, args, [](const auto& a) { cpu::run_sort(a); },
      [&](const auto& a) {
        const at::Tensor scratch = at::empty({static_cast<int64_t>(cuda::scratch_bytes(a))}, rows.options().dtype(at::kByte));
        check_launch(cuda::run_sort(a, scratch.data_ptr(), current_stream()));
      });
  return corrected;
}

at::Tensor scale_gradient(const at::Tensor& grad, const at::Tensor& given, bool keep) {
  const at::Tensor grad_output = given.resolve_neg();
#if defined(SORTKD_CUDA) || defined(SORTKD_SIMT)
  const std::optional<Layout> layout = layout_of(grad);
  // The kernel looks at the scalar itself: the host would have to wait for it.
  if (on_gpu(grad) && layout) {
    const c10::DeviceGuard guard(grad.device());
    const at::Tensor factor = grad_output.to(grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
    at::Tensor scaled = keep ? at::empty_like(grad) : grad;
    check_launch(cuda::run_scale({*layout, dtype_of(grad, "grad"), factor.const_data_ptr(), factor.dim() ? 1 : 0,
                                  grad.const_data_ptr(), scaled.data_ptr()},
                                 current_stream()));
    return scaled;
  }
#endif
  if (is_one(grad_output)) return keep ? grad.clone() : grad;
  if (keep) return (grad * (grad_output.dim() ? grad_output.unsqueeze(-1) : grad_output)).to(grad.scalar_type());
  if (!grad_output.dim() || grad.dim() == 1) return at::Tensor(grad).mul_(grad_output);
  // A product of half rows with float factors is made in float, at twice the memory: so only some rows at a time.
  const int64_t rows = grad.size(0), step = std::max<int64_t>(1, rows / 64);
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    grad.narrow(0, row, count).mul_(grad_output.narrow(0, row, count).unsqueeze(-1));
  }
  return grad;
}

}  // namespace sortkd
