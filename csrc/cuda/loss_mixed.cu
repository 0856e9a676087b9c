// Any float dtypes but double, any strides, top-k teachers.
#include "instances.cuh"

SORTKD_INSTANCE(sortkd::cuda::Scattered<float>)
