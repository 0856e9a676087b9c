// The one function that each of the files loss_*.cu holds.
#pragma once

#include <cuda_runtime.h>

#include "choices.h"
#include "params.h"

namespace sortkd {
namespace cuda {

struct Half;
struct BFloat16;
template <typename X>
struct Peeled;
template <typename T>
struct Scattered;

// Enqueue the row kernels of a loss on rows that are accessed in this way.
template <typename Access>
void launch_rows(const LossChoice& choice, const LossParams<typename Access::T>& p, cudaStream_t stream);

}  // namespace cuda
}  // namespace sortkd
