// The few places where the sources know whether nvcc compiles them, or a host compiler for the test harness
// (SORTKD_SIMT): launches, shared memory, the fast exponential, and what the optimizer may not see through.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define SORTKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<dim3(grid), dim3(block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#else
#define SORTKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  simt::launch(#kernel, kernel, dim3(grid), dim3(block), (shared_bytes), __VA_ARGS__)
#endif

namespace sortkd {
namespace cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

__device__ __forceinline__ char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) char memory[];
  return memory;
#else
  return simt::shared_memory();
#endif
}

// 2^x. The instruction has a relative error of 2 roundings; results below the normal range are 0, and NaN stays NaN.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

// Nothing happens to the word, but the compiler must assume so. Without this it would unpack halves once for all passes
// over a row and keep the floats, for which there are no registers.
__device__ __forceinline__ void hide(unsigned& word) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(word));
#else
  (void)word;
#endif
}

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x % kWarp; }

// Any small plain struct, a word at a time.
template <typename V>
__device__ __forceinline__ V shuffled_xor(const V& value, int offset) {
  static_assert(sizeof(V) % 4 == 0);
  constexpr int kWords = sizeof(V) / 4;
  unsigned words[kWords];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = __shfl_xor_sync(kFullMask, words[w], offset);
  V result;
  memcpy(&result, words, sizeof(V));
  return result;
}

}  // namespace cuda
}  // namespace sortkd
