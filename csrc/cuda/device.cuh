// What the kernels ask of the hardware, each with a plain form for the test harness (SORTKD_SIMT).
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "../row_math.h"

#define SORTKD_DEVICE __device__ __forceinline__

// Clusters of blocks, which see each other's shared memory.
#if defined(SORTKD_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define SORTKD_CLUSTER 1
#else
#define SORTKD_CLUSTER 0
#endif

namespace sortkd {
namespace cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

SORTKD_DEVICE char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) char memory[];
  return memory;
#else
  return simt::shared_memory();
#endif
}

// 2^x. The instruction has a relative error of 2 roundings; results below the normal range are 0, and NaN stays NaN.
SORTKD_DEVICE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
// Its absolute error is 2^-22 near 1, its relative error elsewhere.
SORTKD_DEVICE float log2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}
// 1 / x to a rounding; subnormal numbers are 0.
SORTKD_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}
SORTKD_DEVICE double power_of_two(double x) { return exp2(x); }

// What the compiler must take as it is: it would fold a pointer into 64-bit arithmetic for each access, and keep what
// it has computed from a number, for which there are no registers.
template <typename V>
SORTKD_DEVICE V compiler_barrier(V value) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_pointer_v<V>) {
    const bool global = __isGlobal(value);
    asm("" : "+l"(value));
    __builtin_assume(global ? __isGlobal(value) : __isShared(value));
  } else if constexpr (std::is_same_v<V, int>) {
    asm volatile("" : "+r"(value));
  } else if constexpr (std::is_same_v<V, float>) {
    asm volatile("" : "+f"(value));
  } else if constexpr (std::is_same_v<V, unsigned short>) {
    asm volatile("" : "+h"(value));
  }
#endif
  return value;
}

// The same of a pointer into device memory.
template <typename V>
SORTKD_DEVICE V* device_pointer(V* pointer) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// What instructions take for a place in the block's own shared memory.
SORTKD_DEVICE unsigned shared_address(const void* place) {
#if defined(__CUDA_ARCH__)
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
#else
  (void)place;
  return 0;
#endif
}

// 16 bytes on their way from device to shared memory. What has been started is there after copies_wait(), for the thread
// that has started it.
SORTKD_DEVICE void copy_async(void* to, const void* from) {
#if defined(SORTKD_SIMT)
  simt::copy_async(to, from);
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#endif
}
// As a branch would; without one.
SORTKD_DEVICE void store_if(bool condition, uint4* to, const uint4& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   static_cast<int>(condition)),
               "l"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  if (condition) *to = value;
#endif
}
SORTKD_DEVICE void copies_wait() {
#if defined(SORTKD_SIMT)
  simt::copies_wait();
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// What this thread has written before is there, on the device, for who sees what it writes next. The runtime's own fence is
// in one order with all others of the device, for which it waits longer.
SORTKD_DEVICE void fence_device() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  __threadfence();
#endif
}

// A launch may begin while the one before it runs (Launch::overlaps), once all blocks of that one allow it; until it has
// waited, it must not look at what that one writes.
SORTKD_DEVICE void allow_next_launch() {
#if defined(__CUDA_ARCH__) && SORTKD_CLUSTER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
SORTKD_DEVICE void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && SORTKD_CLUSTER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

SORTKD_DEVICE unsigned lane_id() { return threadIdx.x % kWarp; }

// This block of its cluster.
SORTKD_DEVICE unsigned cluster_rank() {
#if defined(SORTKD_SIMT)
  return simt::machine.current->rank;
#else
  unsigned rank = 0;
#if SORTKD_CLUSTER
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
#endif
}
SORTKD_DEVICE void cluster_barrier() {
#if defined(SORTKD_SIMT)
  simt::cluster_barrier();
#elif SORTKD_CLUSTER
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// An mbarrier of one arrival: a phase of it is over when its block has said how many bytes the cluster's blocks send to
// their places, and these have come. What was sent with it is there then, and nothing else: there is no barrier of all
// threads and no fence, which would wait for the gradient's stores too.
using Mbarrier = uint64_t;
SORTKD_DEVICE void mbarrier_init(Mbarrier* barrier) {
#if defined(SORTKD_SIMT)
  simt::mbarrier_init(barrier);
#elif SORTKD_CLUSTER
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
SORTKD_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
#if defined(SORTKD_SIMT)
  simt::mbarrier_arrive_expect(barrier, bytes);
#elif SORTKD_CLUSTER
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
// Until the phase of this parity is over.
SORTKD_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
#if defined(SORTKD_SIMT)
  simt::mbarrier_wait(barrier, parity);
#elif SORTKD_CLUSTER
  unsigned over = 0;
  while (!over)
    asm volatile("{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
}
// Sends `value` to `place`, and the number of its bytes to `barrier`, of block `rank`.
template <typename V>
SORTKD_DEVICE void send_async(V* place, const V& value, Mbarrier* barrier, unsigned rank) {
  static_assert(sizeof(V) % 4 == 0);
#if defined(SORTKD_SIMT)
  simt::sends.send(place, value, barrier, rank);
#elif SORTKD_CLUSTER
  unsigned words[sizeof(V) / 4], to, there;
  memcpy(words, &value, sizeof(V));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(place)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
  if constexpr (sizeof(V) % 16 == 0) {
#pragma unroll
    for (unsigned i = 0; i < sizeof(V) / 4; i += 4)
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to + 4 * i),
          "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]), "r"(there)
          : "memory");
  } else {
#pragma unroll
    for (unsigned i = 0; i < sizeof(V) / 4; ++i)
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to + 4 * i), "r"(words[i]),
                   "r"(there)
                   : "memory");
  }
#endif
}

}  // namespace cuda
}  // namespace sortkd
