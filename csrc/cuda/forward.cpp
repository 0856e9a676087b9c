// The ops on CUDA tensors: layout, memory, and what the launchers are told. Nothing here waits for the device.
#include "../ops.h"
#include "../preconditions.h"
#include "../rows.h"
#include "job.h"
#include "stream.h"

namespace sortkd {
namespace {

cuda::Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return cuda::Dtype::Double;
    case at::kBFloat16: return cuda::Dtype::BFloat16;
    case at::kHalf: return cuda::Dtype::Half;
    default: return cuda::Dtype::Float;
  }
}

void check_device(const at::Tensor& t, const char* name, const at::Tensor& student) {
  TORCH_CHECK_VALUE(t.device() == student.device(), "sortkd_kernels: expected ", name, " on ", student.device(),
                    ", got ", t.device());
}

void check_classes(int64_t C) {
  TORCH_CHECK_VALUE(C < (int64_t(1) << 30), "sortkd_kernels: expected fewer than 2^30 classes, got ", C);
}

at::Tensor scratch_of(const auto& job, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(cuda::scratch_bytes(job))}, like.options().dtype(at::kByte));
}

void* data_or_null(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

}  // namespace

LossResult forward_cuda(const LossTensors& tensors, const LossConfig& config, const GradRequest& request) {
  const auto& student = tensors.student;
  const int64_t class_dim = config.class_dim < 0 ? config.class_dim + student.dim() : config.class_dim;
  check_logits(student, "student", class_dim);
  check_classes(student.size(class_dim));
  check_row_tensor(tensors.target, "target", student, class_dim);
  TORCH_CHECK_TYPE(tensors.target.scalar_type() == at::kLong, "sortkd_kernels: expected target of dtype int64");
  TORCH_CHECK_TYPE(is_float_dtype(tensors.teacher), "sortkd_kernels: expected teacher of a float dtype");
  check_device(tensors.teacher, "teacher", student);
  if (!tensors.teacher_indices)
    TORCH_CHECK_VALUE(tensors.teacher.sizes().equals(student.sizes()), "sortkd_kernels: expected teacher of shape ",
                      student.sizes(), ", got ", tensors.teacher.sizes());

  const cuda::DeviceGuard guard(student.device());
  const Rows rows = as_rows(tensors, class_dim);
  const int64_t N = rows.layout.rows();
  const bool acc_double = student.scalar_type() == at::kDouble || tensors.teacher.scalar_type() == at::kDouble;
  const auto acc = student.options().dtype(acc_double ? at::kDouble : at::kFloat);

  cuda::LossJob job{};
  job.layout = rows.layout;
  job.options = {static_cast<Correction>(config.correction), config.decoupled, config.standardize,
                 config.ce_weight != 0 || config.parts,      config.uniform_tail, config.kd_weight,
                 config.alpha,                               config.beta,         config.ce_weight};
  job.reduction = static_cast<Reduction>(config.reduction);
  job.acc_double = acc_double;
  job.student_dtype = dtype_of(student);
  job.teacher_dtype = dtype_of(tensors.teacher);
  job.student = rows.student.const_data_ptr();
  job.teacher = rows.teacher.const_data_ptr();
  at::Tensor indices;
  if (tensors.teacher_indices) {
    check_device(*tensors.teacher_indices, "teacher_indices", student);
    indices = tensors.teacher_indices->contiguous();
    check_top_k_shapes(indices, rows.teacher, N, rows.layout.C);
    job.teacher_indices = indices.const_data_ptr<int64_t>();
    job.k = rows.teacher.size(-1);
  }
  job.target = rows.target.const_data_ptr<int64_t>();
  job.ignore_index = config.ignore_index;

  at::Tensor temperature, upstream;
  job.temperature_value = config.temperature;
  if (tensors.temperature) {
    check_device(*tensors.temperature, "temperature", student);
    temperature = tensors.temperature->to(acc.dtype()).contiguous();
    if (temperature.dim()) check_row_tensor(temperature, "temperature", student, class_dim);
    job.temperature = temperature.const_data_ptr();
    job.temperature_stride = temperature.dim() ? 1 : 0;
  }
  if (request.upstream) {
    upstream = request.upstream->to(acc.dtype()).contiguous();
    job.upstream = upstream.const_data_ptr();
    job.upstream_stride = upstream.dim() ? 1 : 0;
  }

  LossResult result;
  const at::IntArrayRef shape = job.reduction == Reduction::None ? tensors.target.sizes() : at::IntArrayRef();
  result.loss = at::empty(shape, acc);
  if (config.parts) {
    result.kd = at::empty(shape, acc);
    result.ce = at::empty(shape, acc);
    result.rank = at::empty(tensors.target.sizes(), acc.dtype(at::kInt));
    job.rank = result.rank.data_ptr<int32_t>();
  }
  at::Tensor grad;
  if (request.student) grad = request.inplace ? rows.student : at::empty(rows.student.sizes(), rows.student.options());
  if (request.temperature) result.grad_temperature = at::empty({N}, acc);
  job.loss = result.loss.data_ptr();
  job.kd = data_or_null(result.kd);
  job.ce = data_or_null(result.ce);
  job.grad_student = data_or_null(grad);
  job.grad_temperature = data_or_null(result.grad_temperature);

  const at::Tensor scratch = scratch_of(job, student);
  cuda::check_launch(cuda::run_loss(job, scratch.data_ptr(), cuda::current_stream()));
  result.grad_student =
      request.student && rows.class_last && class_dim != student.dim() - 1 ? grad.movedim(-1, class_dim) : grad;
  return result;
}

at::Tensor sort_logits_cuda(const at::Tensor& teacher, const at::Tensor& target, int64_t correction,
                            int64_t ignore_index) {
  check_logits(teacher, "teacher", teacher.dim() - 1);
  check_classes(teacher.size(-1));
  check_row_tensor(target, "target", teacher, teacher.dim() - 1);
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "sortkd_kernels: expected target of dtype int64");
  const cuda::DeviceGuard guard(teacher.device());
  at::Tensor rows = teacher.contiguous();
  // The kernel takes the same 16-byte steps through its input and its output.
  if (reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16) rows = rows.clone();
  const at::Tensor labels = target.contiguous();
  at::Tensor corrected = at::empty(rows.sizes(), rows.options());
  const cuda::SortJob job{labels.numel(),
                          teacher.size(-1),
                          static_cast<Correction>(correction),
                          dtype_of(teacher),
                          rows.const_data_ptr(),
                          labels.const_data_ptr<int64_t>(),
                          ignore_index,
                          corrected.data_ptr()};
  const at::Tensor scratch = scratch_of(job, teacher);
  cuda::check_launch(cuda::run_sort(job, scratch.data_ptr(), cuda::current_stream()));
  return corrected;
}

at::Tensor scale_cuda(const at::Tensor& grad, const at::Tensor& upstream, int64_t class_dim, bool keep) {
  const cuda::DeviceGuard guard(grad.device());
  const int64_t dim = class_dim < 0 ? class_dim + grad.dim() : class_dim;
  const int64_t C = grad.size(dim);
  int64_t inner = 1;
  if (!grad.movedim(dim, -1).is_contiguous())  // else row after row: forward makes either
    for (int64_t d = dim + 1; d < grad.dim(); ++d) inner *= grad.size(d);
  const at::Tensor factor =
      upstream.to(grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  at::Tensor scaled = keep ? at::empty_like(grad) : grad;
  const int64_t outer = grad.numel() / C / std::max<int64_t>(inner, 1);
  const cuda::ScaleJob job{{outer, C, inner},      dtype_of(grad),        factor.const_data_ptr(), factor.dim() ? 1 : 0,
                           grad.const_data_ptr(), scaled.data_ptr()};
  cuda::check_launch(cuda::run_scale(job, cuda::current_stream()));
  return scaled;
}

}  // namespace sortkd
