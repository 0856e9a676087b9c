// A gradient times what came from above, in place or to another place.
#include "choices.h"
#include "host.h"
#include "vector.cuh"

namespace sortkd {
namespace cuda {

// Values of a thread: 16 bytes of halves, or as many floats or doubles in two or four accesses.
constexpr int kScaleValues = 8;

// One factor for all values, or one for each row of [outer, C, inner]; `span` = C * inner. The host need not know
// whether the one factor is 1, the upstream gradient of a plain loss.backward(): in place, that costs a launch and no
// traffic.
template <typename X>
__global__ void __launch_bounds__(256)
    sort_kd_scale(const X* grad, X* scaled, const Acc<X>* upstream, bool one, int64_t total, int64_t span,
                  int64_t inner, bool vectors) {
  using T = Acc<X>;
  constexpr int kWidth = Vector<X>::kWidth;
  if (one && grad == scaled && *upstream == T(1)) return;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kScaleValues;
  const auto factor = [&](int64_t i) { return one ? *upstream : upstream[i / span * inner + i % inner]; };
  if (vectors && first + kScaleValues <= total) {
    // Within a row of contiguous classes the factor changes at most once.
    const int64_t next = inner == 1 ? (first / span + 1) * span : first;
    const T now = factor(first), then = next < first + kScaleValues ? factor(next) : now;
#pragma unroll
    for (int v = 0; v < kScaleValues / kWidth; ++v) {
      Vector<X> g = load_vector(grad + first + v * kWidth, true);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g.set(i, g.get(i) * (first + v * kWidth + i < next ? now : then));
      store_vector(scaled + first + v * kWidth, g);
    }
    return;
  }
  const int64_t end = min(first + kScaleValues, total);
  for (int64_t i = first; i < end; ++i) scaled[i] = narrowed<X>(widened(grad[i]) * factor(i));
}

namespace {

template <typename X>
cudaError_t run(const ScaleArgs& job, cudaStream_t stream) {
  const int64_t span = job.layout.C * job.layout.inner, total = job.layout.outer * span;
  if (total == 0) return cudaSuccess;
  const bool one = job.grad_output_stride == 0;
  const auto past = (reinterpret_cast<uintptr_t>(job.grad) | reinterpret_cast<uintptr_t>(job.scaled)) % 16;
  // Two rows at most in a thread's values, and neighbouring classes in them.
  const bool vectors = past == 0 && (one || (job.layout.inner == 1 && span >= kScaleValues));
  const auto blocks = static_cast<unsigned>((total + 256 * kScaleValues - 1) / (256 * kScaleValues));
  SORTKD_LAUNCH((sort_kd_scale<X>), blocks, 256, 0, stream, static_cast<const X*>(job.grad),
                static_cast<X*>(job.scaled), static_cast<const Acc<X>*>(job.grad_output), one, total, span,
                job.layout.inner, vectors);
  return cudaGetLastError();
}

}  // namespace

int run_scale(const ScaleArgs& job, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (job.dtype == Dtype::Float) return run<float>(job, stream);
  if (job.dtype == Dtype::BFloat16) return run<BFloat16>(job, stream);
  if (job.dtype == Dtype::Half) return run<Half>(job, stream);
  return run<double>(job, stream);
}

}  // namespace cuda
}  // namespace sortkd
