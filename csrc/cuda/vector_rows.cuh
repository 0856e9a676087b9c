// The kernels of rows whose two sides have one dtype X of 2 or 4 bytes, and which of them a call takes.
#pragma once

#include "held.cuh"
#include "rows.cuh"

namespace sortkd {
namespace cuda {

template <typename X>
cudaError_t launch_rows(const Shape& shape, Mode mode, const Launch& launch, const Params<float>& p, cudaStream_t stream) {
  using V = Vectors<X>;
  constexpr int kMost = kValuesHeld / V::W;
  const auto run = [&](void (*kernel)(Params<float>)) { return launch_kernel("sort_kd_rows", kernel, launch, stream, p); };
  const bool lanes = shape.kind == Kind::Lanes;
  if (p.long_blocks) return run(sort_kd_rows<V, Kind::Block, 0, Mode::General, lists_of_rest(true, sizeof(X))>);
  if (shape.held == 0)
    return run(mode == Mode::General ? sort_kd_rows<V, Kind::Block, 0, Mode::General, Lists::Short>
                                     : kd_rows<V, Kind::Block, 0, Lists::Short>(mode));
  if (mode == Mode::General)
    return run(lanes ? sort_kd_held<X, Kind::Lanes, kMost, -1, Mode::General>
                     : sort_kd_held<X, Kind::Block, kMost, -1, Mode::General>);
  if (mode == Mode::KdCeAny)
    return run(lanes ? sort_kd_held<X, Kind::Lanes, kMost, -1, Mode::KdCeAny>
                     : sort_kd_held<X, Kind::Block, kMost, -1, Mode::KdCeAny>);
  if (!lanes) return run(kd_held<X, Kind::Block, kMost, -1>(mode));
  if (shape.held == 1) return run(kd_held<X, Kind::Lanes, 1, -1>(mode));
  if (shape.held < kMost) return run(kd_held<X, Kind::Lanes, 4, -1>(mode));
  if (shape.lanes < 32) return run(kd_held<X, Kind::Lanes, kMost, -1>(mode));
  return run(kd_held<X, Kind::Lanes, kMost, 5>(mode));
}

}  // namespace cuda
}  // namespace sortkd
