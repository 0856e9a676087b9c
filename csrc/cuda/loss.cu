// The launches of a loss: count the rows, work on them in registers, stream what is left, sum.
#include "access.cuh"
#include "choices.h"
#include "host.h"
#include "launch_rows.h"
#include "order.cuh"
#include "reduce.cuh"

namespace sortkd {
namespace cuda {

namespace {

// Sixteen aligned bytes at a time, wherever a row begins: both sides and the gradient must be as far from it.
bool can_peel(const LossArgs& job) {
  if (job.layout.inner != 1 || job.teacher_indices || job.student_dtype != job.teacher_dtype) return false;
  const auto past = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  if (past(job.student) != past(job.teacher)) return false;
  if (job.grad_student && past(job.grad_student) != past(job.student)) return false;
  // A short row that begins anywhere has little between its edges.
  const int64_t bytes = job.layout.C * bytes_of(job.student_dtype);
  return (bytes % 16 == 0 && past(job.student) == 0) || bytes >= 256;
}

// How a job is launched, and its scratch memory. Made twice, for the size and for the launches.
template <typename T>
struct Plan {
  bool peeled, left;
  LossChoice choice;
  int sums;
  unsigned* counts;
  unsigned* left_count;
  int64_t* left_rows;
  char* entries;
  T* dense;
  T *kd, *ce;
  double *kd_sums, *ce_sums;
  size_t bytes;

  Plan(const LossArgs& job, void* scratch) : bytes(0) {
    const int64_t rows = job.layout.rows(), C = job.layout.C;
    const LossConfig& options = job.config;
    const int processors = cuda::processors();
    peeled = can_peel(job);
    const T temperature = static_cast<T>(job.config.temperature);
    const bool power = !job.temperature && (temperature == T(1) || temperature == T(2) || temperature == T(4));
    choice.general = options.standardize || job.grad_temperature || (options.with_ce() && !power);
    const int width = 16 / (peeled ? bytes_of(job.student_dtype) : static_cast<int>(sizeof(T)));
    const bool aligned =
        reinterpret_cast<uintptr_t>(job.student) % 16 == 0 && C * bytes_of(job.student_dtype) % 16 == 0;
    choice.tile = choose_tile(rows, C, job.layout.inner, width, peeled, aligned,
                              most_tile_threads(sizeof(T) == 8, choice.general, peeled), processors);
    choice.tiled = choice.tile.fits && !job.teacher_indices;
    left = choice.tiled && options.correction == Correction::Sort && settled_rank(C) < C - 1;
    choice.streamed = !choice.tiled || left;
    choice.stream = choose_stream(rows, C, width, options.correction != Correction::None, sizeof(Entry<T>),
                                  job.teacher_indices ? sizeof(T) : 0, processors);
    sums = sum_blocks(rows);

    Pieces pieces{static_cast<char*>(scratch)};
    counts = pieces.take<unsigned>(kMostSumBlocks);
    left_count = pieces.take<unsigned>(1);
    left_rows = pieces.take<int64_t>(left ? rows : 0);
    entries = pieces.take<char>(choice.streamed ? choice.stream.blocks * choice.stream.entry_bytes : 0);
    dense = job.teacher_indices ? pieces.take<T>(choice.stream.blocks * C) : nullptr;
    const bool reduced = job.config.reduction != Reduction::None;
    kd = !reduced && job.kd ? static_cast<T*>(job.kd) : pieces.take<T>(rows);
    ce = !reduced && job.ce ? static_cast<T*>(job.ce) : options.with_ce() ? pieces.take<T>(rows) : nullptr;
    kd_sums = pieces.take<double>(sums);
    ce_sums = pieces.take<double>(sums);
    bytes = pieces.used;
  }

  LossParams<T> params(const LossArgs& job) const {
    const LossConfig& options = job.config;
    const int64_t C = job.layout.C;
    LossParams<T> p{};
    p.rows = job.layout.rows();
    p.inner = job.layout.inner;
    p.C = static_cast<int>(C);
    p.student_dtype = job.student_dtype;
    p.teacher_dtype = job.teacher_dtype;
    p.student = job.student;
    p.teacher = job.teacher;
    p.teacher_indices = job.teacher_indices;
    p.k = static_cast<int>(job.k);
    p.grad_student = job.grad_student;
    p.target = job.target;
    p.ignore_index = job.config.ignore_index;
    p.temperature = static_cast<const T*>(job.temperature);
    p.temperature_stride = static_cast<int>(job.temperature_stride);
    p.temperature_value = static_cast<T>(job.config.temperature);
    p.upstream = static_cast<const T*>(job.grad_output);
    p.upstream_stride = static_cast<int>(job.grad_output_stride);
    p.counts = job.config.reduction == Reduction::Mean ? counts : nullptr;
    p.count_blocks = sums;
    p.correction = options.correction;
    p.passes = choice.general ? Passes::General : options.with_ce() ? Passes::WithPower : Passes::Distillation;
    p.power = static_cast<int>(job.config.temperature);
    p.decoupled = options.decoupled();
    p.standardize = options.standardize;
    p.with_ce = options.with_ce();
    p.uniform_tail = options.uniform_tail;
    p.kd_weight = static_cast<T>(options.kd_weight);
    p.ce_weight = static_cast<T>(options.ce_weight);
    p.alpha = static_cast<T>(options.alpha);
    p.beta = static_cast<T>(options.beta_of(C));
    p.loss = job.config.reduction == Reduction::None ? static_cast<T*>(job.loss) : nullptr;
    p.kd = kd;
    p.ce = ce;
    p.grad_temperature = static_cast<T*>(job.grad_temperature);
    p.rank = job.rank;
    p.group = choice.tile.group;
    p.step = choice.tile.step;
    p.used = choice.tile.used;
    p.settled = left ? settled_rank(C) : p.C;
    p.left_count = left ? left_count : nullptr;
    p.left = left ? left_rows : nullptr;
    p.entries = entries;
    p.entry_bytes = choice.stream.entry_bytes;
    p.shared_entries = choice.stream.shared_entries;
    p.dense = dense;
    return p;
  }
};

template <typename T>
cudaError_t run(const LossArgs& job, void* scratch, cudaStream_t stream) {
  const Plan<T> plan(job, scratch);
  const LossParams<T> p = plan.params(job);
  if (p.rows > 0) {
    if (p.counts)
      SORTKD_LAUNCH(sort_kd_count, plan.sums, kReduceThreads, kGroupBytes, stream, job.target, p.rows, job.config.ignore_index,
                    plan.counts, plan.left_count);
    else if (plan.left)
      cudaMemsetAsync(plan.left_count, 0, sizeof(unsigned), stream);
    if (!plan.peeled)
      launch_rows<Scattered<T>>(plan.choice, p, stream);
    else if constexpr (sizeof(T) == 8)
      launch_rows<Peeled<double>>(plan.choice, p, stream);
    else if (job.student_dtype == Dtype::Float)
      launch_rows<Peeled<float>>(plan.choice, p, stream);
    else if (job.student_dtype == Dtype::BFloat16)
      launch_rows<Peeled<BFloat16>>(plan.choice, p, stream);
    else
      launch_rows<Peeled<Half>>(plan.choice, p, stream);
  }
  if (job.config.reduction == Reduction::None) return cudaGetLastError();
  T* const loss = static_cast<T*>(job.loss);
  T* const kd = static_cast<T*>(job.kd);
  T* const ce = static_cast<T*>(job.ce);
  const double kd_weight = job.config.kd_weight, ce_weight = job.config.ce_weight;
  if (plan.sums == 1) {
    if (p.counts && p.rows == 0) cudaMemsetAsync(plan.counts, 0, sizeof(unsigned), stream);
    SORTKD_LAUNCH((sort_kd_reduce<T, T>), 1, kReduceThreads, kGroupBytes, stream, plan.kd, plan.ce, p.rows, p.counts,
                  plan.sums, kd_weight, ce_weight, loss, kd, ce);
  } else {
    SORTKD_LAUNCH((sort_kd_sum<T>), plan.sums, kReduceThreads, kGroupBytes, stream, plan.kd, plan.ce, p.rows,
                  plan.kd_sums, plan.ce_sums);
    SORTKD_LAUNCH((sort_kd_reduce<double, T>), 1, kReduceThreads, kGroupBytes, stream, plan.kd_sums, plan.ce_sums,
                  plan.sums, p.counts, plan.sums, kd_weight, ce_weight, loss, kd, ce);
  }
  return cudaGetLastError();
}

}  // namespace

size_t scratch_bytes(const LossArgs& job) {
  return job.acc_double() ? Plan<double>(job, nullptr).bytes : Plan<float>(job, nullptr).bytes;
}

int run_loss(const LossArgs& job, void* scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  return job.acc_double() ? run<double>(job, scratch, stream) : run<float>(job, scratch, stream);
}

}  // namespace cuda
}  // namespace sortkd
