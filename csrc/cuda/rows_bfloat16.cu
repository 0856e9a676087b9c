#include "vector_rows.cuh"

namespace sortkd {
namespace cuda {
template cudaError_t launch_rows<BFloat16>(const Shape&, Mode, const Launch&, const Params<float>&, cudaStream_t);
}  // namespace cuda
}  // namespace sortkd
