// The op on CPU tensors: layout, labels, memory, rows, reduction.
#include "../launch.h"
#include "../ops.h"
#include "../preconditions.h"
#include "../rows.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sortkd {
namespace {

// A result of many megabytes is a fresh mapping, and touching it page by page costs more than computing it: ask for huge
// pages. The advice is one system call, and nothing where the system does not take it.
at::Tensor empty_large(const at::Tensor& like) {
  at::Tensor grad = at::empty(like.sizes(), like.options());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  if (grad.nbytes() >= 2 * kHuge) {
    const auto begin = (reinterpret_cast<uintptr_t>(grad.data_ptr()) + kHuge - 1) / kHuge * kHuge;
    const auto end = (reinterpret_cast<uintptr_t>(grad.data_ptr()) + grad.nbytes()) / kHuge * kHuge;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return grad;
}

// Serial and in double: the same bits for any number of threads.
template <typename T>
double sum_rows(const at::Tensor& rows) {
  double sum = 0;
  const T* values = rows.const_data_ptr<T>();
  for (int64_t n = 0; n < rows.numel(); ++n) sum += values[n];
  return sum;
}

template <typename T>
void reduce(LossResult& result, const LossConfig& config, const at::Tensor& kd_rows, const at::Tensor& ce_rows,
            int64_t counted, at::IntArrayRef shape) {
  const auto options = kd_rows.options();
  const bool with_ce = ce_rows.defined();
  const bool weighted_ce = config.ce_weight != 0;
  if (config.reduction == static_cast<int64_t>(Reduction::None)) {
    if (config.parts) {
      result.kd = kd_rows.view(shape);
      result.ce = ce_rows.view(shape);
    }
    result.loss = at::empty(shape, options);
    T* loss = result.loss.data_ptr<T>();
    const T* kd = kd_rows.const_data_ptr<T>();
    const T* ce = with_ce ? ce_rows.const_data_ptr<T>() : nullptr;
    for (int64_t n = 0; n < kd_rows.numel(); ++n) {
      loss[n] = static_cast<T>(config.kd_weight) * kd[n];
      if (weighted_ce) loss[n] += static_cast<T>(config.ce_weight) * ce[n];
    }
    return;
  }
  // No row counts: 0 / 0, as in F.cross_entropy.
  const double denominator =
      config.reduction == static_cast<int64_t>(Reduction::Mean) ? static_cast<double>(counted) : 1.0;
  const double kd = sum_rows<T>(kd_rows) / denominator;
  const double ce = with_ce ? sum_rows<T>(ce_rows) / denominator : 0.0;
  const auto scalar = [&](double value) {
    at::Tensor t = at::empty({}, options);
    *t.data_ptr<T>() = static_cast<T>(value);
    return t;
  };
  result.loss = scalar(weighted_ce ? config.kd_weight * kd + config.ce_weight * ce : config.kd_weight * kd);
  if (!config.parts) return;
  result.kd = scalar(kd);
  result.ce = scalar(ce);
}

}  // namespace

LossResult forward_cpu(const LossTensors& tensors, const LossConfig& config, const GradRequest& request) {
  const auto& student = tensors.student;
  const int64_t class_dim = config.class_dim < 0 ? config.class_dim + student.dim() : config.class_dim;
  check_logits(student, "student", class_dim);
  check_row_tensor(tensors.target, "target", student, class_dim);
  TORCH_CHECK_TYPE(tensors.target.scalar_type() == at::kLong, "sortkd_kernels: expected target of dtype int64");
  TORCH_CHECK_TYPE(is_float_dtype(tensors.teacher), "sortkd_kernels: expected teacher of a float dtype");
  if (!tensors.teacher_indices)
    TORCH_CHECK_VALUE(tensors.teacher.sizes().equals(student.sizes()), "sortkd_kernels: expected teacher of shape ",
                      student.sizes(), ", got ", tensors.teacher.sizes());

  const Rows rows = as_rows(tensors, class_dim);
  const int64_t N = rows.layout.rows();
  const int64_t counted = check_labels(rows.target, rows.layout.C, config.ignore_index);
  const bool acc_double = student.scalar_type() == at::kDouble || tensors.teacher.scalar_type() == at::kDouble;
  const auto acc = student.options().dtype(acc_double ? at::kDouble : at::kFloat);

  LossArgs args{};
  args.layout = rows.layout;
  args.options = {static_cast<Correction>(config.correction), config.decoupled, config.standardize,
                  config.ce_weight != 0 || config.parts,      config.uniform_tail, config.kd_weight,
                  config.alpha,                               config.beta,         config.ce_weight};
  args.acc_double = acc_double;
  args.student_dtype = student.scalar_type();
  args.teacher_dtype = tensors.teacher.scalar_type();
  args.student = rows.student.const_data_ptr();
  args.teacher = rows.teacher.const_data_ptr();
  at::Tensor indices;
  if (tensors.teacher_indices) {
    indices = tensors.teacher_indices->contiguous();
    check_top_k(indices, rows.teacher, N, rows.layout.C);
    args.teacher_indices = indices.const_data_ptr<int64_t>();
    args.k = rows.teacher.size(-1);
  }
  args.target = rows.target.const_data_ptr<int64_t>();
  args.ignore_index = config.ignore_index;

  at::Tensor temperature;
  const double scalar_temperature = config.temperature;
  const float scalar_temperature_float = static_cast<float>(scalar_temperature);
  if (tensors.temperature) {
    temperature = tensors.temperature->to(acc.dtype()).contiguous();
    if (temperature.dim()) check_row_tensor(temperature, "temperature", student, class_dim);
    args.temperature = temperature.const_data_ptr();
    args.temperature_stride = temperature.dim() ? 1 : 0;
  } else {
    args.temperature = acc_double ? static_cast<const void*>(&scalar_temperature) : &scalar_temperature_float;
  }

  const bool mean = config.reduction == static_cast<int64_t>(Reduction::Mean);
  // With no row to count there is no gradient either; 0 keeps 0 * inf out of it.
  const double scale = mean ? (counted ? 1.0 / static_cast<double>(counted) : 0.0) : 1.0;
  const float scale_float = static_cast<float>(scale);
  at::Tensor upstream;
  if (request.upstream) {
    upstream = (request.upstream->to(acc.dtype()) * scale).contiguous();
    args.upstream = upstream.const_data_ptr();
    args.upstream_stride = upstream.dim() ? 1 : 0;
  } else {
    args.upstream = acc_double ? static_cast<const void*>(&scale) : &scale_float;
  }

  LossResult result;
  const at::Tensor kd_rows = at::empty({N}, acc);
  at::Tensor ce_rows;
  if (args.options.want_ce) ce_rows = at::empty({N}, acc);
  if (config.parts) result.rank = at::empty(tensors.target.sizes(), acc.dtype(at::kInt));
  at::Tensor grad;
  if (request.student) {
    grad = request.inplace ? rows.student : empty_large(rows.student);
    args.grad_student = grad.data_ptr();
  }
  if (request.temperature) result.grad_temperature = at::empty({N}, acc);
  args.kd = kd_rows.data_ptr();
  args.ce = args.options.want_ce ? ce_rows.data_ptr() : nullptr;
  args.rank = config.parts ? result.rank.data_ptr<int32_t>() : nullptr;
  args.grad_temperature = request.temperature ? result.grad_temperature.data_ptr() : nullptr;

  if (N) cpu::sort_kd_loss(args);

  result.grad_student =
      request.student && rows.class_last && class_dim != student.dim() - 1 ? grad.movedim(-1, class_dim) : grad;
  if (acc_double)
    reduce<double>(result, config, kd_rows, ce_rows, counted, tensors.target.sizes());
  else
    reduce<float>(result, config, kd_rows, ce_rows, counted, tensors.target.sizes());
  return result;
}

at::Tensor sort_logits_cpu(const at::Tensor& teacher, const at::Tensor& target, int64_t correction,
                           int64_t ignore_index) {
  check_logits(teacher, "teacher", teacher.dim() - 1);
  check_row_tensor(target, "target", teacher, teacher.dim() - 1);
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "sortkd_kernels: expected target of dtype int64");
  const at::Tensor rows = teacher.contiguous(), labels = target.contiguous();
  const int64_t C = teacher.size(-1);
  check_labels(labels, C, ignore_index);
  at::Tensor corrected = empty_large(rows);
  SortArgs args{{labels.numel(), C, 1},
                static_cast<Correction>(correction),
                teacher.scalar_type(),
                rows.const_data_ptr(),
                labels.const_data_ptr<int64_t>(),
                ignore_index,
                corrected.data_ptr()};
  if (labels.numel()) cpu::sort_kd_sort(args);
  return corrected;
}

}  // namespace sortkd
