// The kernels of all other rows: of two dtypes and of top-k teachers in whole vectors; and, read from memory twice a class
// at a time, classes that lie apart, doubles, and what has no whole vectors.
#include "rows.cuh"

namespace sortkd {
namespace cuda {

template <typename T>
cudaError_t launch_mixed(const Shape& shape, Mode mode, const Launch& launch, const Params<T>& p, cudaStream_t stream) {
  const auto run = [&](void (*kernel)(Params<T>)) { return launch_kernel("sort_kd_rows", kernel, launch, stream, p); };
  if constexpr (std::is_same_v<T, float>) {
    const auto with_student = [&](auto&& f) {
      return p.student_dtype == Dtype::Float ? f(float{}) : p.student_dtype == Dtype::Half ? f(Half{}) : f(BFloat16{});
    };
    const auto strided = [&](auto x) {
      return run(kd_rows<Strided<decltype(x)>, Kind::Columns, kValuesHeld, Lists::Short>(mode));
    };
    const auto top_k = [&](auto x) { return run(kd_rows<WholeVectors<decltype(x), void>, Kind::Block, 0, Lists::TopK>(mode)); };
    const auto two_dtypes = [&](auto x, auto y) {
      using V = WholeVectors<decltype(x), decltype(y)>;
      if (shape.kind == Kind::Lanes) return run(kd_rows<V, Kind::Lanes, kValuesHeld / V::W, Lists::Short>(mode));
      return run(kd_rows<V, Kind::Block, 0, Lists::Short>(mode));
    };
    if (p.long_blocks) return run(sort_kd_rows<Mixed<T, false>, Kind::Block, 0, Mode::General, Lists::Long>);
    if (shape.kind == Kind::Columns && mode == Mode::General)
      return run(sort_kd_rows<Mixed<T, false>, Kind::Columns, 0, Mode::General, Lists::Short>);
    if (shape.kind == Kind::Columns) return with_student(strided);
    if (mode != Mode::General && p.teacher_indices) return with_student(top_k);
    if (mode != Mode::General) {
      if (p.student_dtype == Dtype::Half) return two_dtypes(Half{}, float{});
      if (p.student_dtype == Dtype::BFloat16) return two_dtypes(BFloat16{}, float{});
      return p.teacher_dtype == Dtype::Half ? two_dtypes(float{}, Half{}) : two_dtypes(float{}, BFloat16{});
    }
  }
  return run(p.teacher_indices ? sort_kd_rows<Mixed<T, true>, Kind::Block, 0, Mode::General, Lists::TopK>
                               : sort_kd_rows<Mixed<T, false>, Kind::Block, 0, Mode::General, Lists::Short>);
}

template cudaError_t launch_mixed<float>(const Shape&, Mode, const Launch&, const Params<float>&, cudaStream_t);
template cudaError_t launch_mixed<double>(const Shape&, Mode, const Launch&, const Params<double>&, cudaStream_t);

}  // namespace cuda
}  // namespace sortkd
