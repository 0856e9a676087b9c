// What the blocks of a cluster have in common: each other's shared memory, and barriers that count the bytes which one
// block sends to another.
#pragma once

#include <cstring>
#include <vector>

#include "machine.h"

namespace simt {

// Whether some thread of the block has not ended: until then its shared memory is there.
inline bool is_alive(uint32_t rank) {
  const uint64_t threads = uint64_t{blockDim.x} * blockDim.y * blockDim.z;
  for (uint64_t i = rank * threads; i < (rank + 1) * threads; ++i)
    if (machine.threads[i].state != Thread::State::Exited) return true;
  return false;
}

// The place of another block's shared memory that this one's has.
template <typename V>
V* in_block(V* place, uint32_t rank) {
  const auto* const byte = reinterpret_cast<const char*>(place);
  const auto offset = byte - own_shared().base();
  if (offset < 0 || static_cast<size_t>(offset) + sizeof(V) > own_shared().bytes())
    fail("a place that is not in the block's shared memory, in block " + std::to_string(rank));
  if (rank >= machine.blocks) fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(machine.blocks));
  if (!is_alive(rank)) fail("shared memory of block " + std::to_string(rank) + ", which has ended");
  return reinterpret_cast<V*>(machine.shared[rank].base() + offset);
}

// An mbarrier of one arrival, in the eight bytes that it has in shared memory.
struct Mbarrier {
  static constexpr uint16_t kOpen = 0xb0a7;
  int32_t bytes;    // that are awaited still; negative: more than have been announced have come
  uint8_t arrived;  // in this phase
  uint8_t parity;   // of the phase
  uint16_t open;

  static Mbarrier& at(uint64_t* place) {
    auto& barrier = *reinterpret_cast<Mbarrier*>(place);
    if (barrier.open != kOpen) fail("an mbarrier that has not been initialised");
    return barrier;
  }
  void end_phase() {
    if (arrived && bytes == 0) arrived = 0, parity ^= 1;
  }
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

inline void mbarrier_init(uint64_t* place) { *reinterpret_cast<Mbarrier*>(place) = {0, 0, 0, Mbarrier::kOpen}; }

inline void mbarrier_arrive_expect(uint64_t* place, int bytes) {
  Mbarrier& barrier = Mbarrier::at(place);
  if (barrier.arrived) fail("a second arrival at an mbarrier of one");
  barrier.arrived = 1;
  barrier.bytes += bytes;
  barrier.end_phase();
}

inline bool is_over(const Thread& waiting) {
  return reinterpret_cast<const Mbarrier*>(waiting.given & ~uint64_t{1})->parity != (waiting.given & 1);
}
inline std::string missing(const Thread& waiting) {
  const auto* const barrier = reinterpret_cast<const Mbarrier*>(waiting.given & ~uint64_t{1});
  return barrier->arrived ? std::to_string(barrier->bytes) + " bytes" : "its block to say for how many bytes";
}

// Until the phase of this parity is over.
inline void mbarrier_wait(uint64_t* place, int parity, std::source_location site = std::source_location::current()) {
  Mbarrier::at(place);
  wait_at({"mbarrier_wait", Awaits::Bytes, 0, site}, reinterpret_cast<uint64_t>(place) | static_cast<uint64_t>(parity));
}

inline void cluster_barrier(std::source_location site = std::source_location::current()) {
  wait_at({"cluster_barrier", Awaits::Cluster, 0, site}, 0);
}

// What is sent is there at once in the forward order, else as late as may be: when no thread can go on without it.
class Sends {
 public:
  template <typename V>
  void send(V* place, const V& value, uint64_t* barrier, uint32_t rank) {
    Sent sent{reinterpret_cast<char*>(simt::in_block(place, rank)), std::vector<char>(sizeof(V)),
              simt::in_block(barrier, rank)};
    std::memcpy(sent.bytes.data(), &value, sizeof(V));
    Mbarrier::at(sent.barrier);
    under_way_.push_back(std::move(sent));
    if (settings.order == Order::Forward) deliver();
  }

  // False where nothing was under way.
  bool deliver() {
    const bool any = !under_way_.empty();
    Visits visits;
    for (const uint32_t i : visits(under_way_.size())) {
      const Sent& sent = under_way_[i];
      std::memcpy(sent.to, sent.bytes.data(), sent.bytes.size());
      auto& barrier = *reinterpret_cast<Mbarrier*>(sent.barrier);
      barrier.bytes -= static_cast<int32_t>(sent.bytes.size());
      barrier.end_phase();
    }
    under_way_.clear();
    return any;
  }

  void check_delivered() {
    if (under_way_.empty()) return;
    under_way_.clear();
    throw Fault(machine.kernel + ": a cluster has ended before what its blocks have sent each other had come");
  }

 private:
  struct Sent {
    char* to;
    std::vector<char> bytes;
    uint64_t* barrier;
  };
  std::vector<Sent> under_way_;
};

inline Sends sends;

}  // namespace simt
