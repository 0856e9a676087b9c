// The element types: sixteen bytes of logits as they lie in memory, and one logit.
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
