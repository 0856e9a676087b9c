// A top-k teacher's row, written out in a block's scratch memory: from there on it is a row like any other.
//
// The label may lie outside the k classes, and may rank anywhere among values that nobody promised to be the largest.
// On the full row the correction needs no special case for either.
#pragma once

#include "access.cuh"
#include "sums.cuh"

namespace sortkd {
namespace cuda {

template <typename T>
__device__ __forceinline__ void densify(const LossParams<T>& p, int64_t row, Group& group) {
  T* dense = p.dense + static_cast<int64_t>(blockIdx.x) * p.C;
  const auto values = Scattered<T>::side(p.teacher, p.teacher_dtype, row * p.k, 1);
  const int64_t* indices = p.teacher_indices + row * p.k;
  T tail = -kInfinity<T>;
  if (p.uniform_tail && p.k < p.C) {
    // The tail's share is what the k leave of 1, which may be little: in double.
    Sums<double, 1> mass{};
    for (int i = group.member; i < p.k; i += group.size)
      mass.of[0] += exp(static_cast<double>(Scattered<T>::one(values, i)));
    mass = group.merged(mass);
    // Rounding may leave a hair above 1: then nothing is left. NaN stays NaN.
    if (!(mass.of[0] >= 1)) tail = static_cast<T>(log((1 - mass.of[0]) / (p.C - p.k)));
  }
  for (int c = group.member; c < p.C; c += group.size) dense[c] = tail;
  __syncthreads();
  for (int i = group.member; i < p.k; i += group.size) {
    const int64_t c = indices[i];
    assert(c >= 0 && c < p.C && "sortkd_kernels: a teacher index is outside [0, C)");
    dense[c] = Scattered<T>::one(values, i);
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace sortkd
