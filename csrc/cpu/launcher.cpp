// The CPU's launcher: checks the labels, runs the build of the row loop that fits this processor on ATen's threads, reduces.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <string>

#include "../row_math.h"
#include "rows.h"

namespace sortkd {

SORTKD_DECLARE_ROWS(DEFAULT)
#if defined(SORTKD_X86)
SORTKD_DECLARE_ROWS(AVX2)
SORTKD_DECLARE_ROWS(AVX512)
#endif

namespace cpu {
namespace {

enum class Capability { Baseline, Avx2, Avx512 };

// ATen's own choice, so ATEN_CPU_CAPABILITY overrides both alike.
Capability detect() {
#if defined(SORTKD_X86)
  const std::string name = at::get_cpu_capability();
  if (name == "AVX512") return Capability::Avx512;
  if (name == "AVX2") return Capability::Avx2;
#endif
  return Capability::Baseline;
}

const Capability kCapability = detect();

// The row loops for arithmetic in T, of the instruction set that this processor has.
template <typename T>
struct RowLoops {
  void (*loss)(const RowLoop&, int64_t, int64_t, T);
  void (*corrected)(const SortArgs&, int64_t, int64_t, T);
};
template <typename T>
RowLoops<T> row_loops() {
#if defined(SORTKD_X86)
  if (kCapability == Capability::Avx512) return {&AVX512::loss_rows, &AVX512::corrected_rows};
  if (kCapability == Capability::Avx2) return {&AVX2::loss_rows, &AVX2::corrected_rows};
#endif
  return {&DEFAULT::loss_rows, &DEFAULT::corrected_rows};
}

// Waking a thread costs some microseconds: about this many logits' worth of work.
constexpr int64_t kGrainLogits = 32768;

template <typename F>
void for_rows(int64_t rows, int64_t C, F&& f) {
  if (rows) at::parallel_for(0, rows, std::max<int64_t>(1, kGrainLogits / C), f);
}

// Returns how many rows count.
int64_t check_labels(const int64_t* labels, int64_t rows, int64_t C, int64_t ignore_index) {
  int64_t counted = 0;
  for (int64_t n = 0; n < rows; ++n) {
    if (labels[n] == ignore_index) continue;
    TORCH_CHECK_INDEX(labels[n] >= 0 && labels[n] < C, "sortkd_kernels: expected target in [0, ", C, ") or ignore_index ",
                      ignore_index, ", got ", labels[n], " in row ", n);
    ++counted;
  }
  return counted;
}

void check_top_k(const LossArgs& args) {
  const ClassIndices indices{args.teacher_indices, args.int64_indices};
  for (int64_t i = 0; i < args.layout.rows() * args.k; ++i)
    TORCH_CHECK_INDEX(indices[i] >= 0 && indices[i] < args.layout.C, "sortkd_kernels: expected teacher_indices in [0, ",
                      args.layout.C, "), got ", indices[i], " in row ", i / args.k);
}

// Serial and in double: the same bits for any number of threads.
template <typename T>
double sum_rows(const T* values, int64_t rows) {
  double sum = 0;
  for (int64_t n = 0; n < rows; ++n) sum += values[n];
  return sum;
}

template <typename T>
void reduce(const RowLoop& loop, int64_t counted) {
  const LossArgs& args = loop.args;
  const LossConfig& config = args.config;
  const int64_t rows = args.layout.rows();
  const T *kd = static_cast<const T*>(loop.kd), *ce = static_cast<const T*>(loop.ce);
  T* const loss = static_cast<T*>(args.loss);
  if (config.reduction == Reduction::None) {
    const T kd_weight = static_cast<T>(config.kd_weight), ce_weight = static_cast<T>(config.ce_weight);
    for (int64_t n = 0; n < rows; ++n) loss[n] = ce_weight == T(0) ? kd_weight * kd[n] : kd_weight * kd[n] + ce_weight * ce[n];
    return;
  }
  // No row counts: 0 / 0, as in F.cross_entropy.
  const double denominator = config.reduction == Reduction::Mean ? static_cast<double>(counted) : 1.0;
  const double kd_mean = sum_rows(kd, rows) / denominator;
  const double ce_mean = config.with_ce() ? sum_rows(ce, rows) / denominator : 0.0;
  // Asked for as a part only, an infinite cross-entropy leaves the loss alone.
  *loss = static_cast<T>(config.kd_weight * kd_mean + (config.ce_weight == 0 ? 0 : config.ce_weight * ce_mean));
  if (args.kd) *static_cast<T*>(args.kd) = static_cast<T>(kd_mean);
  if (args.ce) *static_cast<T*>(args.ce) = static_cast<T>(ce_mean);
}

}  // namespace

const char* capability() {
  return kCapability == Capability::Avx512 ? "avx512" : kCapability == Capability::Avx2 ? "avx2" : "baseline";
}

size_t scratch_bytes(const LossArgs& args) {
  return 2 * static_cast<size_t>(args.layout.rows()) * (args.acc_double() ? sizeof(double) : sizeof(float));
}

void run_loss(const LossArgs& args, void* scratch) {
  const int64_t rows = args.layout.rows(), C = args.layout.C;
  const int64_t counted = check_labels(args.target, rows, C, args.config.ignore_index);
  if (args.teacher_indices) check_top_k(args);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    RowLoop loop{args, scratch, args.config.with_ce() ? static_cast<T*>(scratch) + rows : nullptr, 1.0};
    if (args.config.reduction == Reduction::None && args.config.parts) loop.kd = args.kd, loop.ce = args.ce;
    // With no row to count there is no gradient either; 0 keeps 0 * inf out of it.
    if (args.config.reduction == Reduction::Mean) loop.mean_scale = counted ? 1.0 / static_cast<double>(counted) : 0.0;
    for_rows(rows, C, [&](int64_t begin, int64_t end) { row_loops<T>().loss(loop, begin, end, zero); });
    reduce<T>(loop, counted);
  };
  args.acc_double() ? run(0.0) : run(0.0f);
}

void run_sort(const SortArgs& args) {
  check_labels(args.target, args.rows, args.C, args.ignore_index);
  const auto run = [&](auto zero) {
    for_rows(args.rows, args.C,
             [&](int64_t begin, int64_t end) { row_loops<decltype(zero)>().corrected(args, begin, end, zero); });
  };
  args.dtype == Dtype::Double ? run(0.0) : run(0.0f);
}

}  // namespace cpu
}  // namespace sortkd
