// The bridge from Python to the planted faults.
#pragma once

#include <cstddef>
#include <string>

namespace simt_faults {

struct Launch {
  std::string kernel;
  bool planted;
  unsigned blocks, threads, cluster;
  size_t shared_bytes;
};

// in, out: [n]. Throws simt::Fault.
void run(const Launch& launch, const float* in, float* out, int n);

}  // namespace simt_faults
