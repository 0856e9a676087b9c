// Student and teacher in double.
#include "instances.cuh"

SORTKD_INSTANCE(sortkd::cuda::Peeled<double>)
