// IEEE half and bfloat16 as bits, with the roundings that the hardware does: to the nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

struct alignas(2) __half {
  uint16_t bits;
};

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t magnitude = (h.bits & 0x7fffu) << 13;
  // As a float the exponent is 112 too small; the product is exact, subnormal halves included.
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x7c00u << 13) bits = 0x7f800000u | magnitude;  // infinity, or NaN with its payload
  return std::bit_cast<float>(bits | (h.bits & 0x8000u) << 16);
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) return {0x7fff};  // the NaN that the hardware gives
  if (magnitude >= 0x477ff000u) {                // 65520, half way from the largest half to the next power of two
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below the normal halves: the sum's last bit is worth 2^-24, and the processor rounds to it.
    rounded = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    rounded = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

inline float __bfloat162float(__nv_bfloat16 b) { return std::bit_cast<float>(uint32_t{b.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
