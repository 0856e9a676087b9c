// Choose the build of the row loop that fits this processor, and spread the rows over ATen's threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <string>

#include "../launch.h"

#define SORTKD_DECLARE_ROWS(CAPABILITY)                                        \
  namespace CAPABILITY {                                                       \
  void loss_rows(const LossArgs&, int64_t, int64_t, float);                    \
  void loss_rows(const LossArgs&, int64_t, int64_t, double);                   \
  void corrected_rows(const SortArgs&, int64_t, int64_t, float);               \
  void corrected_rows(const SortArgs&, int64_t, int64_t, double);              \
  }

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

template <typename... Args>
void loss_rows(const Args&... args) {
#if defined(SORTKD_X86)
  if (kCapability == Capability::Avx512) return AVX512::loss_rows(args...);
  if (kCapability == Capability::Avx2) return AVX2::loss_rows(args...);
#endif
  DEFAULT::loss_rows(args...);
}

template <typename... Args>
void corrected_rows(const Args&... args) {
#if defined(SORTKD_X86)
  if (kCapability == Capability::Avx512) return AVX512::corrected_rows(args...);
  if (kCapability == Capability::Avx2) return AVX2::corrected_rows(args...);
#endif
  DEFAULT::corrected_rows(args...);
}

// Waking a thread costs some microseconds: about this many logits' worth of work.
constexpr int64_t kGrainLogits = 32768;

template <typename F>
void for_rows(const Layout& layout, F&& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainLogits / layout.C);
  at::parallel_for(0, layout.rows(), grain, f);
}

}  // namespace

const char* capability() {
  return kCapability == Capability::Avx512 ? "avx512" : kCapability == Capability::Avx2 ? "avx2" : "baseline";
}

void sort_kd_loss(const LossArgs& args) {
  for_rows(args.layout, [&](int64_t begin, int64_t end) {
    if (args.acc_double)
      loss_rows(args, begin, end, 0.0);
    else
      loss_rows(args, begin, end, 0.0f);
  });
}

void sort_kd_sort(const SortArgs& args) {
  for_rows(args.layout, [&](int64_t begin, int64_t end) {
    if (args.dtype == c10::ScalarType::Double)
      corrected_rows(args, begin, end, 0.0);
    else
      corrected_rows(args, begin, end, 0.0f);
  });
}

}  // namespace cpu
}  // namespace sortkd
