#include "vector_rows.cuh"

namespace sortkd {
namespace cuda {
template cudaError_t launch_rows<float>(const Shape&, Mode, const Launch&, const Params<float>&, cudaStream_t);

int most_cluster(const Device& device) {
#if defined(__CUDACC__)
  const auto kernel = sort_kd_held<float, Kind::Block, kValuesHeld / 4, -1, Mode::Kd>;
  int major = 0, current = 0, clusters = 0;
  cudaGetDevice(&current);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current);
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, kernel);
  // A device may run code of an older architecture.
  if (major < 9 || attributes.ptxVersion < 90) return 1;
  for (const int blocks : {kMostCluster, kCluster}) {
    Device asked = device;
    asked.cluster = blocks;
    const ClusterLaunch launch({blocks, kMostRowBlock, blocks, device.shared_bytes}, nullptr);
    if (grant_most(reinterpret_cast<const void*>(kernel), asked) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess && clusters > 0)
      return blocks;
    cudaGetLastError();  // it was a question
  }
  return 1;
#else
  (void)device;
  return 1;
#endif
}
}  // namespace cuda
}  // namespace sortkd
