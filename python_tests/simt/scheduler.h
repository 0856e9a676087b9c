// Runs the threads of one cluster of blocks, mostly of one block, to their ends. Between two collectives each thread
// runs alone; at a collective all of its lanes must arrive, at the same call with the same mask, before any goes on.
#pragma once

#include "cluster.h"

namespace simt {

constexpr uint32_t kWarp = 32;

class Scheduler {
 public:
  // `threads` of a block; a multiple of a warp's where a cluster has several.
  explicit Scheduler(uint32_t threads) : block_threads_(threads), threads_(threads * machine.blocks) {}

  void run_cluster(const uint3& first) {
    for (uint32_t i = 0; i < threads_; ++i) {
      Thread& thread = machine.threads[i];
      const uint32_t n = i % block_threads_;
      thread.rank = i / block_threads_;
      thread.block = {first.x + thread.rank, first.y, first.z};
      thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
      thread.state = Thread::State::Runnable;
      thread.copies.clear();
      thread.fiber.start(&run_thread, i);
    }
    unfinished_ = threads_;
    while (unfinished_) {
      bool moved = false;
      for (const uint32_t block : block_visits_(machine.blocks)) {
        while (step_block(block)) {
          moved = true;
          if (settings.order == Order::Shuffled) break;
        }
      }
      if (moved || sends.deliver()) continue;
      if (!release(0, threads_, Awaits::Cluster)) throw stuck();
    }
    sends.check_delivered();
    for (uint32_t block = 0; block < machine.blocks; ++block)
      if (!machine.shared[block].intact())
        throw Fault(blame(machine.threads[block * block_threads_], "the block has written outside of its " +
                                                                       std::to_string(machine.shared[block].bytes()) +
                                                                       " bytes of shared memory"));
  }

 private:
  static void run_thread() {
    machine.body(machine.parameters);
    if (!machine.current->copies.empty()) fail("ends with asynchronous copies under way");
    machine.current->state = Thread::State::Exited;
    machine.scheduler.resume(machine.current->fiber);
  }

  void resume(Thread& thread) {
    machine.current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block;
    thread.fiber.resume(machine.scheduler);
    machine.current = nullptr;
    if (machine.overdue) machine.fault = blame(thread, kEndless);
    if (!machine.fault.empty()) throw Fault(std::exchange(machine.fault, {}));
    unfinished_ -= thread.state == Thread::State::Exited;
  }

  Thread& lane(uint32_t warp, uint32_t lane) const { return machine.threads[warp * kWarp + lane]; }
  uint32_t lanes(uint32_t warp) const { return std::min(kWarp, threads_ - warp * kWarp); }

  // A block runs ahead of the others as far as it can, and a warp of the block's warps; shuffled, they take turns. False
  // where none could move.
  bool step_block(uint32_t block) {
    const uint32_t warps = (block_threads_ + kWarp - 1) / kWarp, first = block * block_threads_;
    bool moved = false;
    for (const uint32_t warp : warp_visits_(warps)) {
      while (step(block * warps + warp)) {
        moved = true;
        if (settings.order == Order::Shuffled) break;
      }
    }
    return moved || release_arrived(first, first + block_threads_) || release(first, first + block_threads_, Awaits::Block);
  }

  // Each lane of the warp up to its next collective, and past it where all have come; false where none could move.
  bool step(uint32_t warp) {
    bool moved = false;
    for (const uint32_t l : lane_visits_(lanes(warp))) {
      Thread& thread = lane(warp, l);
      if (thread.state != Thread::State::Runnable) continue;
      resume(thread);
      moved = true;
    }
    if (moved) release_lanes(warp);
    return moved;
  }

  void release_lanes(uint32_t warp) {
    Thread* stuck = nullptr;
    for (uint32_t l = 0; l < lanes(warp); ++l) {
      Thread& thread = lane(warp, l);
      if (thread.state != Thread::State::Waiting || thread.call.awaits != Awaits::Lanes) continue;
      if (missing_lane(warp, thread) == kWarp)
        release(warp, thread.call.mask);
      else if (!stuck)
        stuck = &thread;
    }
    if (!stuck) return;
    for (uint32_t l = 0; l < lanes(warp); ++l)
      if (lane(warp, l).state == Thread::State::Runnable) return;  // it may still get there
    const uint32_t missing = missing_lane(warp, *stuck);
    throw Fault(blame(*stuck, described(stuck->call) + " waits for lane " + std::to_string(missing) + ", which " +
                                  (missing < lanes(warp) ? whereabouts(lane(warp, missing)) : "does not exist")));
  }

  void release(uint32_t warp, uint32_t mask) {
    for (uint32_t l = 0; l < lanes(warp); ++l) {
      if (!(mask >> l & 1)) continue;
      Thread& thread = lane(warp, l);
      thread.taken = thread.given;
      thread.state = Thread::State::Runnable;
    }
  }

  // The first lane of the mask that is not at the call where the thread waits, or kWarp.
  uint32_t missing_lane(uint32_t warp, const Thread& thread) const {
    for (uint32_t l = 0; l < kWarp; ++l)
      if (thread.call.mask >> l & 1 && (l >= lanes(warp) || !together(lane(warp, l), thread))) return l;
    return kWarp;
  }

  static bool together(const Thread& one, const Thread& other) {
    const auto &a = one.call, &b = other.call;
    return one.state == Thread::State::Waiting && other.state == Thread::State::Waiting && a.awaits == b.awaits &&
           a.mask == b.mask && a.site.line() == b.site.line() && a.site.column() == b.site.column() &&
           place_is_same(a.site, b.site);
  }

  static bool place_is_same(const std::source_location& a, const std::source_location& b) {
    return a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name());
  }

  static std::string whereabouts(const Thread& thread) {
    if (thread.state == Thread::State::Exited) return "has exited";
    const std::string mask = " with the mask " + std::to_string(thread.call.mask);
    return "waits at " + described(thread.call) + (thread.call.awaits == Awaits::Lanes ? mask : "");
  }

  // Those that wait for bytes that have come.
  bool release_arrived(uint32_t from, uint32_t to) {
    bool moved = false;
    for (uint32_t i = from; i < to; ++i) {
      Thread& thread = machine.threads[i];
      if (thread.state != Thread::State::Waiting || thread.call.awaits != Awaits::Bytes || !is_over(thread)) continue;
      thread.state = Thread::State::Runnable;
      moved = true;
    }
    return moved;
  }

  // All of these threads, where they are at one and the same barrier.
  bool release(uint32_t from, uint32_t to, Awaits awaits) {
    uint64_t counted = 0;
    for (uint32_t i = from; i < to; ++i) {
      const Thread& thread = machine.threads[i];
      if (thread.call.awaits != awaits || !together(thread, machine.threads[from])) return false;
      counted += thread.given != 0;
    }
    for (uint32_t i = from; i < to; ++i) {
      machine.threads[i].taken = counted;
      machine.threads[i].state = Thread::State::Runnable;
    }
    return true;
  }

  // Nothing can move: whom the first that waits at a barrier waits for.
  Fault stuck() const {
    const Thread* first = nullptr;
    for (uint32_t i = 0; i < threads_; ++i) {
      const Thread& thread = machine.threads[i];
      if (thread.state == Thread::State::Waiting && (!first || first->call.awaits == Awaits::Bytes)) first = &thread;
    }
    if (first->call.awaits == Awaits::Bytes)
      return Fault(blame(*first, described(first->call) + " waits for " + missing(*first)));
    const bool of_block = first->call.awaits == Awaits::Block;
    for (uint32_t i = 0; i < threads_; ++i) {
      const Thread& thread = machine.threads[i];
      if ((of_block && thread.rank != first->rank) || together(thread, *first)) continue;
      const std::string block = thread.rank == first->rank ? "" : " of block " + described(thread.block);
      return Fault(blame(*first, described(first->call) + " waits for thread " + described(thread.index) + block + ", which " +
                                     whereabouts(thread)));
    }
    return Fault(blame(*first, described(first->call) + " does not end"));
  }

  uint32_t block_threads_;
  uint32_t threads_;
  uint32_t unfinished_ = 0;
  Visits block_visits_, warp_visits_, lane_visits_;
};

}  // namespace simt
