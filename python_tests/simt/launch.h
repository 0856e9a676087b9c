// Runs a kernel: its blocks, or clusters of them, one after another, in the order that is set, to the end or to the first
// fault.
#pragma once

#include <mutex>
#include <tuple>

#include "collectives.h"
#include "runtime.h"
#include "signals.h"

namespace simt {

inline void check_launch(const void* kernel, uint32_t blocks, size_t shared_bytes) {
  const auto refuse = [](const std::string& reason) { throw Fault(machine.kernel + ": " + reason); };
  const uint64_t threads = uint64_t{blockDim.x} * blockDim.y * blockDim.z;
  if (threads == 0 || threads > 1024) refuse("a launch of " + std::to_string(threads) + " threads a block");
  if (!gridDim.x || !gridDim.y || !gridDim.z || gridDim.x > INT32_MAX || gridDim.y > 65535 || gridDim.z > 65535)
    refuse("a launch of " + described({gridDim.x, gridDim.y, gridDim.z}) + " blocks");
  if (blocks < 1 || blocks > kMostBlocks || gridDim.x % blocks || (blocks > 1 && threads % kWarp) ||
      blocks * threads > kMostThreads)
    refuse("a launch of " + described({gridDim.x, gridDim.y, gridDim.z}) + " blocks of " + std::to_string(threads) +
           " threads in clusters of " + std::to_string(blocks));
  if (shared_bytes > shared_limit(kernel))
    refuse("a launch with " + std::to_string(shared_bytes) + " bytes of shared memory, where " +
           std::to_string(shared_limit(kernel)) + " are granted");
}

// In clusters of so many blocks. Throws Fault. Arguments are converted and copied once, as for a GPU.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, uint32_t blocks, dim3 block, size_t shared_bytes,
            Arguments&&... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  using Copies = std::tuple<void (*)(Parameters...), std::tuple<std::remove_cv_t<Parameters>...>>;
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA passes 4 KiB of parameters");
  const Copies copies{kernel, {std::forward<Arguments>(arguments)...}};
  machine.kernel = name;
  machine.parameters = &copies;
  machine.body = [](const void* opaque) {
    const auto& [function, values] = *static_cast<const Copies*>(opaque);
    std::apply(function, values);
  };
  gridDim = grid;
  blockDim = block;
  check_launch(reinterpret_cast<const void*>(kernel), blocks, shared_bytes);
  machine.blocks = blocks;
  sends = {};

  const uint32_t threads = block.x * block.y * block.z;
  const Signals signals;
  Scheduler scheduler(threads);
  Visits visits;
  for (const uint32_t cluster : visits(size_t{grid.x} * grid.y * grid.z / blocks)) {
    const uint32_t i = cluster * blocks;
    for (uint32_t rank = 0; rank < blocks; ++rank) machine.shared[rank].begin(shared_bytes);
    scheduler.run_cluster({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
  }
}

}  // namespace simt
