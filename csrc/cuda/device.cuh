// What the kernels ask of the hardware, each with a plain form for the test harness (SORTKD_SIMT), and the element
// types: sixteen bytes of logits as they lie in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
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
// The address, in the shared memory of block `rank`, of what lies at `place` in this one's.
template <typename V>
SORTKD_DEVICE V* in_block(V* place, unsigned rank) {
#if defined(SORTKD_SIMT)
  return simt::in_block(place, rank);
#elif SORTKD_CLUSTER
  unsigned long long there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
  return reinterpret_cast<V*>(there);
#else
  return place;
#endif
}
// A store there, which is done when the threads of both blocks have passed a barrier of the cluster.
template <typename V>
SORTKD_DEVICE void store_in_block(V* place, const V& value, unsigned rank) {
#if defined(SORTKD_SIMT)
  simt::sends.store(place, value, rank);
#else
  *in_block(place, rank) = value;
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

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

SORTKD_DEVICE float widened(float x) { return x; }
SORTKD_DEVICE double widened(double x) { return x; }
SORTKD_DEVICE float widened(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
SORTKD_DEVICE float widened(Half x) {
  __half h;
  memcpy(&h, &x, sizeof h);
  return __half2float(h);
}

// Rounded to nearest.
template <typename X, typename T>
SORTKD_DEVICE X narrowed(T x) {
  if constexpr (std::is_same_v<X, Half>) {
    const __half h = __float2half_rn(static_cast<float>(x));
    X result;
    memcpy(&result, &h, sizeof h);
    return result;
  } else if constexpr (std::is_same_v<X, BFloat16>) {
    const __nv_bfloat16 h = __float2bfloat16_rn(static_cast<float>(x));
    X result;
    memcpy(&result, &h, sizeof h);
    return result;
  } else {
    return static_cast<X>(x);
  }
}

// The type of arithmetic on logits of type X.
template <typename X>
using Acc = std::conditional_t<std::is_same_v<X, double>, double, float>;

template <typename X>
constexpr int kWidth = 16 / sizeof(X);

template <typename X>
SORTKD_DEVICE void unpack(const uint4& v, Acc<X>* values) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
  if constexpr (sizeof(X) == 8) {
    memcpy(values, words, 16);
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(X) == 4) {
        values[w] = __uint_as_float(words[w]);
      } else if constexpr (std::is_same_v<X, BFloat16>) {
        values[2 * w] = __uint_as_float(words[w] << 16);
        values[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
      } else {
        values[2 * w] = widened(Half{static_cast<unsigned short>(words[w])});
        values[2 * w + 1] = widened(Half{static_cast<unsigned short>(words[w] >> 16)});
      }
    }
  }
}

// Four values of 2 bytes.
template <typename X>
SORTKD_DEVICE void unpack(const uint2& v, float* values) {
  float eight[8];
  unpack<X>(make_uint4(v.x, v.y, 0, 0), eight);
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = eight[i];
}

// The largest of so many vectors' values; NaN counts as none.
template <typename X, int count>
SORTKD_DEVICE float largest_of(const uint4* vectors) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(X) == 2) {  // two at a time
    const auto larger = [](unsigned a, unsigned b) {
      unsigned result;
      if constexpr (std::is_same_v<X, Half>)
        asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
      else
        asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
      return result;
    };
    unsigned low = vectors[0].x, high = vectors[0].z;
#pragma unroll
    for (int j = 0; j < count; ++j) {
      low = larger(larger(low, vectors[j].x), vectors[j].y);
      high = larger(larger(high, vectors[j].z), vectors[j].w);
    }
    low = larger(low, high);
    return max(widened(X{static_cast<unsigned short>(low)}), widened(X{static_cast<unsigned short>(low >> 16)}));
  }
#endif
  float largest = -kInfinity<float>;
#pragma unroll
  for (int j = 0; j < count; ++j) {
    float values[kWidth<X>];
    unpack<X>(vectors[j], values);
#pragma unroll
    for (int i = 0; i < kWidth<X>; ++i) largest = fmaxf(largest, values[i]);
  }
  return largest;
}

template <typename X>
SORTKD_DEVICE uint4 pack(const Acc<X>* values) {
  unsigned words[4];
  if constexpr (sizeof(X) == 8) {
    memcpy(words, values, 16);
  } else if constexpr (sizeof(X) == 4) {
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = __float_as_uint(values[w]);  // not copied: that would go through local memory
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float low = values[2 * w], high = values[2 * w + 1];
#if defined(__CUDA_ARCH__)  // two at a time: one instruction
      if constexpr (std::is_same_v<X, Half>)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[w]) : "f"(high), "f"(low));
      else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[w]) : "f"(high), "f"(low));
#else
      words[w] = narrowed<X>(low).bits | static_cast<unsigned>(narrowed<X>(high).bits) << 16;
#endif
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Four or two bytes at an index, with no branch: several are under way at a time.
SORTKD_DEVICE unsigned bits_at(const void* base, bool wide, int64_t i) {
#if defined(__CUDA_ARCH__)
  unsigned bits;
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\n@p ld.global.b32 %0, [%2];\n@!p ld.global.u16 %0, [%2];\n}"
               : "=r"(bits)
               : "r"(static_cast<int>(wide)), "l"(static_cast<const char*>(base) + (i << (wide ? 2 : 1))));
  return bits;
#else
  unsigned bits = 0;
  memcpy(&bits, static_cast<const char*>(base) + (i << (wide ? 2 : 1)), wide ? 4 : 2);
  return bits;
#endif
}
SORTKD_DEVICE float number_of(unsigned bits, Dtype dtype) {
  if (dtype == Dtype::Half) return widened(Half{static_cast<unsigned short>(bits)});
  return __uint_as_float(bits << (dtype == Dtype::BFloat16 ? 16 : 0));
}

// One element of a dtype that only the call knows.
template <typename T>
SORTKD_DEVICE T element(const void* base, Dtype dtype, int64_t i) {
  if (dtype == Dtype::Float) return static_cast<T>(static_cast<const float*>(base)[i]);
  if (dtype == Dtype::BFloat16) return static_cast<T>(widened(static_cast<const BFloat16*>(base)[i]));
  if constexpr (std::is_same_v<T, float>) return widened(static_cast<const Half*>(base)[i]);
  if (dtype == Dtype::Half) return static_cast<T>(widened(static_cast<const Half*>(base)[i]));
  return static_cast<T>(static_cast<const double*>(base)[i]);
}
template <typename T>
SORTKD_DEVICE void set_element(void* base, Dtype dtype, int64_t i, T x) {
  if (dtype == Dtype::Float) static_cast<float*>(base)[i] = static_cast<float>(x);
  if (dtype == Dtype::BFloat16) static_cast<BFloat16*>(base)[i] = narrowed<BFloat16>(x);
  if (dtype == Dtype::Half) static_cast<Half*>(base)[i] = narrowed<Half>(x);
  if constexpr (std::is_same_v<T, double>)
    if (dtype == Dtype::Double) static_cast<double*>(base)[i] = static_cast<double>(x);
}

}  // namespace cuda
}  // namespace sortkd
