// Student and teacher in float16.
#include "instances.cuh"

SORTKD_INSTANCE(sortkd::cuda::Peeled<sortkd::cuda::Half>)
