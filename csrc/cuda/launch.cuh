// How a row kernel is launched.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

#if defined(__CUDACC__)
// The configuration of a launch, of clusters or beside the one before.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const Launch& launch, cudaStream_t stream) {
    if (launch.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    }
    if (launch.overlaps) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    config.gridDim = launch.blocks;
    config.blockDim = launch.threads;
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};
#endif

template <typename T>
cudaError_t launch_kernel(void (*kernel)(Params<T>), const Launch& launch, const Params<T>& p, cudaStream_t stream) {
  if (const cudaError_t error = grant(kernel, launch.shared_bytes); error != cudaSuccess) return error;
#if defined(__CUDACC__)
  const LaunchConfig configured(launch, stream);
  return cudaLaunchKernelEx(&configured.config, kernel, p);
#else
  (void)stream;
  simt::launch_clusters("sort_kd_rows", kernel, dim3(launch.blocks), launch.cluster, dim3(launch.threads), launch.shared_bytes,
                        p);
#endif
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace sortkd
