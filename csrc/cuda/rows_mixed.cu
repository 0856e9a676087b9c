// The kernels of all other rows, read from memory twice a class at a time: doubles, two dtypes, classes that lie apart
// in long rows, top-k teachers, and rows whose list is in device memory.
#include "row.cuh"

namespace sortkd {
namespace cuda {

template <typename T>
cudaError_t launch_mixed(const Shape& shape, Mode mode, const Launch& launch, const Params<T>& p, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>)
    if (shape.kind == Kind::Columns)
      return launch_kernel(mode == Mode::Kd ? sort_kd_rows<Mixed<T, false>, Kind::Columns, 0, Mode::Kd, false>
                                            : sort_kd_rows<Mixed<T, false>, Kind::Columns, 0, Mode::General, false>,
                           launch, p, stream);
  return launch_kernel(p.teacher_indices ? sort_kd_rows<Mixed<T, true>, Kind::Block, 0, Mode::General, true>
                                         : sort_kd_rows<Mixed<T, false>, Kind::Block, 0, Mode::General, false>,
                       launch, p, stream);
}

template cudaError_t launch_mixed<float>(const Shape&, Mode, const Launch&, const Params<float>&, cudaStream_t);
template cudaError_t launch_mixed<double>(const Shape&, Mode, const Launch&, const Params<double>&, cudaStream_t);

}  // namespace cuda
}  // namespace sortkd
