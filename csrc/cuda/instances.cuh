// Launching the row kernels of one way of access. The files loss_*.cu hold one each, so that they compile side by side.
#pragma once

#include "choices.h"
#include "launch_rows.h"
#include "stream_rows.cuh"
#include "tile_rows.cuh"

namespace sortkd {
namespace cuda {

template <typename Access, bool general>
void launch_tile(const TileChoice& choice, const LossParams<typename Access::T>& p, cudaStream_t stream) {
  const size_t shared = choice.group > 32 ? kGroupBytes : 0;
  const auto blocks = static_cast<unsigned>(choice.blocks);
  SORTKD_LAUNCH((sort_kd_tile<Access, general>), blocks, choice.threads, shared, stream, p);
}

template <typename Access, bool general>
void launch_stream(const StreamChoice& choice, const LossParams<typename Access::T>& p, cudaStream_t stream) {
  const size_t shared = kGroupBytes + kCounterBytes + choice.shared_entries * sizeof(Entry<typename Access::T>);
  SORTKD_LAUNCH((sort_kd_stream<Access, general>), choice.blocks, choice.threads, shared, stream, p);
}

template <typename Access>
void launch_rows(const LossChoice& choice, const LossParams<typename Access::T>& p, cudaStream_t stream) {
  if (choice.tiled) {
    if (choice.general)
      launch_tile<Access, true>(choice.tile, p, stream);
    else
      launch_tile<Access, false>(choice.tile, p, stream);
  }
  if (!choice.streamed) return;
  if (choice.general)
    launch_stream<Access, true>(choice.stream, p, stream);
  else
    launch_stream<Access, false>(choice.stream, p, stream);
}

}  // namespace cuda
}  // namespace sortkd

#define SORTKD_INSTANCE(Access)                                                                   \
  template void sortkd::cuda::launch_rows<Access>(const sortkd::cuda::LossChoice&,                \
                                                  const sortkd::cuda::LossParams<Access::T>&, cudaStream_t);
