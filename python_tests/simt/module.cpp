// What the tests need of the library `sortkd_simt` beside the ops: the harness's settings, and guarded memory for all
// of PyTorch's CPU tensors. A second module of the same library, so that the ops' sources know nothing of it.
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>

#include "bindings.h"
#include "guarded_memory.h"

namespace {

std::atomic<int> damaged{0};

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = new simt::GuardedMemory(bytes);
    return {memory->data(), memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void release(void* context) {
    auto* memory = static_cast<simt::GuardedMemory*>(context);
    damaged += !memory->intact();
    delete memory;
  }
};

void guard(bool on) {
  static GuardedAllocator guarded;
  static c10::Allocator* const ordinary = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : ordinary, 100);
}

}  // namespace

PYBIND11_MODULE(sortkd_simt_harness, module) {
  simt::bind_settings(module);
  module.def("guard", &guard, "From here on tensors end right before memory that nobody may touch; or no longer.");
  module.def("damaged", [] { return damaged.exchange(0); }, "Tensors freed since the last call with a write before them.");
}
