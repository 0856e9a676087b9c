// How the kernels are launched: in clusters, or beginning while the launch before runs, where they may.
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

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const char* name, void (*kernel)(Parameters...), const Launch& launch, cudaStream_t stream,
                          const Arguments&... arguments) {
  if (const cudaError_t error = grant(kernel, launch.shared_bytes); error != cudaSuccess) return error;
#if defined(__CUDACC__)
  (void)name;
  const LaunchConfig configured(launch, stream);
  return cudaLaunchKernelEx(&configured.config, kernel, arguments...);
#else
  (void)stream;
  simt::launch(name, kernel, dim3(launch.blocks), launch.cluster, dim3(launch.threads), launch.shared_bytes, arguments...);
#endif
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace sortkd
