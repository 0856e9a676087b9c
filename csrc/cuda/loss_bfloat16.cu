// Student and teacher in bfloat16.
#include "instances.cuh"

SORTKD_INSTANCE(sortkd::cuda::Peeled<sortkd::cuda::BFloat16>)
