// Sixteen bytes of logits as they lie in memory: halves stay packed, two to a register, until they are used.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.cuh"

namespace sortkd {
namespace cuda {

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// The type of arithmetic on logits of type X.
template <typename X>
struct Arithmetic {
  using Type = float;
};
template <>
struct Arithmetic<double> {
  using Type = double;
};
template <typename X>
using Acc = typename Arithmetic<X>::Type;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widened(Half x) {
  __half h;
  memcpy(&h, &x, sizeof h);
  return __half2float(h);
}

// Rounded to nearest.
template <typename X, typename T>
__device__ __forceinline__ X narrowed(T x) {
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

// Two halves in a word, each rounded to nearest: one instruction.
template <typename X>
__device__ __forceinline__ unsigned packed(float low, float high) {
#if defined(__CUDA_ARCH__)
  unsigned word;
  if constexpr (std::is_same_v<X, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return narrowed<X>(low).bits | static_cast<unsigned>(narrowed<X>(high).bits) << 16;
#endif
}

template <typename X>
struct Vector {
  static constexpr int kWidth = 16 / sizeof(X);
  unsigned word[4];

  __device__ __forceinline__ Acc<X> get(int i) const {
    if constexpr (sizeof(X) == 8) {
      const unsigned long long bits = word[2 * i] | static_cast<unsigned long long>(word[2 * i + 1]) << 32;
      return __longlong_as_double(static_cast<long long>(bits));
    } else if constexpr (sizeof(X) == 4) {
      return __uint_as_float(word[i]);
    } else {
      return widened(X{static_cast<unsigned short>(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu)});
    }
  }

  __device__ __forceinline__ void set(int i, Acc<X> value) {
    if constexpr (sizeof(X) == 8) {
      const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
      word[2 * i] = static_cast<unsigned>(bits);
      word[2 * i + 1] = static_cast<unsigned>(bits >> 32);
    } else if constexpr (sizeof(X) == 4) {
      word[i] = __float_as_uint(value);
    } else {
      const unsigned bits = narrowed<X>(value).bits;
      word[i / 2] = i % 2 ? (word[i / 2] & 0xffffu) | bits << 16 : (word[i / 2] & 0xffff0000u) | bits;
    }
  }

  // All of them: f(i) is the i-th value.
  template <typename F>
  __device__ __forceinline__ void assign(F&& f) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (sizeof(X) == 2) {
        if (i % 2 == 0) word[i / 2] = packed<X>(f(i), f(i + 1));
      } else {
        set(i, f(i));
      }
    }
  }
  __device__ __forceinline__ void fill(Acc<X> value) {
    assign([&](int) { return value; });
  }

  __device__ __forceinline__ void hide_words() {
#pragma unroll
    for (int w = 0; w < 4; ++w) hide(word[w]);
  }
};

// `once`: the row is not read again, and need not displace what is.
template <typename X>
__device__ __forceinline__ Vector<X> load_vector(const X* x, bool once) {
  const uint4* address = reinterpret_cast<const uint4*>(x);
  const uint4 v = once ? __ldcs(address) : *address;
  return {{v.x, v.y, v.z, v.w}};
}
template <typename X>
__device__ __forceinline__ void store_vector(X* x, const Vector<X>& v) {
  *reinterpret_cast<uint4*>(x) = uint4{v.word[0], v.word[1], v.word[2], v.word[3]};
}

}  // namespace cuda
}  // namespace sortkd
