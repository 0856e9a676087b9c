// How a row kernel is launched.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

#if defined(__CUDACC__)
// The configuration of a launch of clusters.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(const Launch& launch, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    config.gridDim = launch.blocks;
    config.blockDim = launch.threads;
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};
#endif

template <typename T>
cudaError_t launch_kernel(void (*kernel)(Params<T>), const Launch& launch, const Params<T>& p, cudaStream_t stream) {
  if (const cudaError_t error = grant(kernel, launch.shared_bytes); error != cudaSuccess) return error;
#if defined(__CUDACC__)
  if (launch.cluster > 1) {
    const ClusterLaunch clusters(launch, stream);
    return cudaLaunchKernelEx(&clusters.config, kernel, p);
  }
  kernel<<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(p);
#else
  (void)stream;
  simt::launch_clusters("sort_kd_rows", kernel, dim3(launch.blocks), launch.cluster, dim3(launch.threads), launch.shared_bytes,
                        p);
#endif
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace sortkd
