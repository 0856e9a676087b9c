// The extension module `simt_faults`: one planted fault at a time, on guarded memory; and the harness's number formats.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "faults.h"
#include "guarded_memory.h"
#include "half.h"

namespace {

std::vector<float> run(const std::string& kernel, bool planted, const std::vector<float>& in, unsigned blocks, unsigned threads,
                       unsigned cluster, size_t shared_bytes) {
  const simt::GuardedMemory input(in.size() * sizeof(float)), output(in.size() * sizeof(float));
  auto *from = static_cast<float*>(input.data()), *to = static_cast<float*>(output.data());
  std::copy(in.begin(), in.end(), from);
  simt_faults::run({kernel, planted, blocks, threads, cluster, shared_bytes}, from, to, static_cast<int>(in.size()));
  if (!input.intact() || !output.intact()) throw std::runtime_error(kernel + ": a write before the start of a tensor");
  return {to, to + in.size()};
}

}  // namespace

PYBIND11_MODULE(simt_faults, module) {
  simt::bind_settings(module);
  module.def("run", &run, pybind11::arg("kernel"), pybind11::arg("planted"), pybind11::arg("input"),
             pybind11::arg("blocks") = 1, pybind11::arg("threads") = 64, pybind11::arg("cluster") = 1,
             pybind11::arg("shared_bytes") = 256);
  module.def("half_to_float", [](uint16_t bits) { return __half2float({bits}); });
  module.def("float_to_half", [](float x) { return __float2half_rn(x).bits; });
  module.def("bfloat16_to_float", [](uint16_t bits) { return __bfloat162float({bits}); });
  module.def("float_to_bfloat16", [](float x) { return __float2bfloat16_rn(x).bits; });
}
