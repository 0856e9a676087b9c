#include <map>
#include <mutex>
#include <tuple>

#include "vector_rows.cuh"

namespace sortkd {
namespace cuda {
template cudaError_t launch_rows<float>(const Shape&, Mode, const Launch&, const Params<float>&, cudaStream_t);

#if defined(__CUDACC__)
namespace {

// Kernels of rows that blocks hold take as many registers as these.
template <Mode mode>
constexpr auto held_kernel = sort_kd_held<float, Kind::Block, kValuesHeld / 4, -1, mode>;

int ask_clusters(const Shape& shape, Mode mode, const Device& device) {
  const auto kernel = mode == Mode::General ? held_kernel<Mode::General> : held_kernel<Mode::Kd>;
  int clusters = 0;
  const LaunchConfig launch({shape.cluster * device.processors, shape.threads, shape.cluster, shape.bytes, false}, nullptr);
  if (grant_most(reinterpret_cast<const void*>(kernel), device) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
    cudaGetLastError();  // it was a question
    return 0;
  }
  return clusters;
}

}  // namespace
#endif

int most_cluster(const Device& device) {
#if defined(__CUDACC__)
  int major = 0, current = 0;
  cudaGetDevice(&current);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current);
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, held_kernel<Mode::Kd>);
  // A device may run code of an older architecture.
  if (major < 9 || attributes.ptxVersion < 90) return 1;
  for (const int blocks : {kMostCluster, kCluster}) {
    Device asked = device;
    asked.cluster = blocks;
    if (ask_clusters({Kind::Block, kValuesHeld / 4, 1, kMostRowBlock, blocks, 1, device.shared_bytes}, Mode::Kd, asked) > 0)
      return blocks;
  }
#else
  (void)device;
#endif
  return 1;
}

int resident_clusters(const Shape& shape, Mode mode) {
#if defined(__CUDACC__)
  static std::mutex mutex;
  static std::map<std::tuple<int, bool, int, int, int>, int> known;
  int current = 0;
  cudaGetDevice(&current);
  const std::lock_guard lock(mutex);
  const auto [at, is_new] = known.try_emplace({current, mode == Mode::General, shape.threads, shape.cluster, shape.bytes}, 0);
  if (is_new) at->second = std::max(ask_clusters(shape, mode, device()), 1);
  return at->second;
#else
  (void)shape, (void)mode;
  return device().processors;
#endif
}
}  // namespace cuda
}  // namespace sortkd
