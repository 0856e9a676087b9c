// Stands in for CUDA's header of this name: device code as C++, its threads run by ../launch.h.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#include "../assertion.h"
#include "../intrinsics.h"
#include "../launch.h"
#include "../sanitizer.h"
