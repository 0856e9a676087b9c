// Student and teacher in float.
#include "instances.cuh"

SORTKD_INSTANCE(sortkd::cuda::Peeled<float>)
