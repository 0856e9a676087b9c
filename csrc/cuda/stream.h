// What forward.cpp asks of the device that a tensor is on. The test harness runs the kernels on CPU tensors
// (SORTKD_SIMT), where there is nothing to ask.
#pragma once

#include <ATen/ATen.h>

#if defined(SORTKD_SIMT)
#include <cuda_runtime.h>
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace sortkd {
namespace cuda {

#if defined(SORTKD_SIMT)
struct DeviceGuard {
  explicit DeviceGuard(c10::Device) {}
};
inline cudaStream_t current_stream() { return nullptr; }
inline void check_launch(cudaError_t) {}
#else
using DeviceGuard = c10::cuda::CUDAGuard;
inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }
inline void check_launch(cudaError_t error) { C10_CUDA_CHECK(error); }
#endif

}  // namespace cuda
}  // namespace sortkd
