// How a row kernel is launched.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

#if defined(__CUDACC__)
template <typename T>
cudaError_t launch_kernel(void (*kernel)(Params<T>), const Launch& launch, const Params<T>& p, cudaStream_t stream) {
  if (launch.shared_bytes > kGrantedShared) {
    const cudaError_t error = grant_shared(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  if (launch.cluster == 1) {
    kernel<<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(p);
    return cudaGetLastError();
  }
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  config.gridDim = launch.blocks;
  config.blockDim = launch.threads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}
#else
// The blocks of a cluster as one block of all their threads.
template <typename T>
cudaError_t launch_kernel(void (*kernel)(Params<T>), const Launch& launch, Params<T> p, cudaStream_t) {
  p.cluster = 1;
  if (launch.shared_bytes > kGrantedShared)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  simt::launch("sort_kd_rows", kernel, dim3(launch.blocks / launch.cluster), dim3(launch.threads * launch.cluster),
               launch.shared_bytes, p);
  return cudaSuccess;
}
#endif

}  // namespace cuda
}  // namespace sortkd
