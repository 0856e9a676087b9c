// The one cluster of blocks, mostly of one, that runs: its threads, and the way out of a launch when something is wrong.
#pragma once

#include <csignal>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "settings.h"
#include "shared_memory.h"
#include "vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

// What a launch throws: kernel, block, thread and what they did.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who must come to a call before any goes on: lanes, or all threads; or what must.
enum class Awaits { Lanes, Block, Cluster, Bytes };

// A call of a collective; lanes are together when all of this is equal.
struct Call {
  const char* name = nullptr;
  Awaits awaits = Awaits::Lanes;
  uint32_t mask = 0;  // of lanes; of no meaning to the others
  std::source_location site;
};

// Sixteen bytes on their way to shared memory.
struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  enum class State { Runnable, Waiting, Exited };
  Fiber fiber;
  uint3 index{}, block{};
  uint32_t rank = 0;  // of the block in its cluster
  State state = State::Exited;
  Call call;  // where it waits
  std::vector<Copy> copies;
  uint64_t given = 0;  // what it brought there
  uint64_t taken = 0;  // what the others may read once all have arrived; of a block, how many gave something
};

constexpr uint32_t kMostThreads = 1024, kMostBlocks = 16;  // of a block, and here of a cluster too; blocks of a cluster

struct Machine {
  std::string kernel;
  void (*body)(const void* parameters) = nullptr;
  const void* parameters = nullptr;
  Thread threads[kMostThreads];  // of the cluster that runs; their stacks are kept from launch to launch
  Thread* current = nullptr;     // null while the scheduler runs
  Fiber scheduler;
  SharedMemory shared[kMostBlocks];
  uint32_t blocks = 1;  // of a cluster
  std::string fault;    // what the current thread did, for the scheduler to throw
  volatile std::sig_atomic_t overdue = 0;
};

inline Machine machine;

inline std::string place_of(const char* file, unsigned line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

inline std::string described(const Call& call) {
  return std::string(call.name) + " (" + place_of(call.site.file_name(), call.site.line()) + ")";
}

inline std::string described(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

inline std::string blame(const Thread& thread, const std::string& deed) {
  return machine.kernel + ": block " + described(thread.block) + ", thread " + described(thread.index) + ": " + deed;
}

// Ends the launch because of what the current thread did. Its stack and those of the other threads are left as they
// are: kernels own nothing that a destructor would have to give back.
[[noreturn]] inline void fail(const std::string& deed) {
  Thread& thread = *std::exchange(machine.current, nullptr);
  machine.fault = blame(thread, deed);
  machine.scheduler.resume(thread.fiber);
  __builtin_unreachable();
}

constexpr const char* kEndless = "the launch does not end";

// On the current thread: waits at a collective until the scheduler finds all of its lanes there.
inline void wait_at(const Call& call, uint64_t given) {
  Thread& thread = *machine.current;
  thread.call = call;
  thread.given = given;
  thread.state = Thread::State::Waiting;
  machine.scheduler.resume(thread.fiber);
}

// A copy that has been started is there at once in the forward order, else as late as may be: when it is waited for.
inline void copies_wait() {
  for (const Copy& copy : std::exchange(machine.current->copies, {})) std::memcpy(copy.to, copy.from, 16);
}
inline void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    fail(
        "an asynchronous copy between addresses "
        "that are no multiples of 16");
  machine.current->copies.push_back({to, from});
  if (settings.order == Order::Forward) copies_wait();
}

inline SharedMemory& own_shared() { return machine.shared[machine.current->rank]; }
inline char* shared_memory() { return own_shared().base(); }

}  // namespace simt
