// Any float dtypes of which one is double, any strides, top-k teachers.
#include "instances.cuh"

SORTKD_INSTANCE(sortkd::cuda::Scattered<double>)
