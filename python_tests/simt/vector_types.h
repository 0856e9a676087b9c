// CUDA's vector types, with the alignment that the hardware demands of them.
#pragma once

#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SIMT_VECTOR2(name, element)          \
  struct alignas(2 * sizeof(element)) name { \
    element x, y;                            \
  };                                         \
  inline name make_##name(element x, element y) { return {x, y}; }
#define SIMT_VECTOR4(name, element)                                          \
  struct alignas(sizeof(element) * 4 > 16 ? 16 : sizeof(element) * 4) name { \
    element x, y, z, w;                                                      \
  };                                                                         \
  inline name make_##name(element x, element y, element z, element w) { return {x, y, z, w}; }

SIMT_VECTOR2(float2, float)
SIMT_VECTOR2(double2, double)
SIMT_VECTOR2(int2, int)
SIMT_VECTOR2(uint2, unsigned)
SIMT_VECTOR2(ushort2, unsigned short)
SIMT_VECTOR4(float4, float)
SIMT_VECTOR4(int4, int)
SIMT_VECTOR4(uint4, unsigned)
SIMT_VECTOR4(ushort4, unsigned short)

#undef SIMT_VECTOR2
#undef SIMT_VECTOR4
