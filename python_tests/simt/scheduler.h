// Runs the threads of one block to their ends. Between two collectives each thread runs alone; at a collective all of
// its lanes must arrive, at the same call with the same mask, before any goes on.
#pragma once

#include "machine.h"

namespace simt {

constexpr uint32_t kWarp = 32;

class Scheduler {
 public:
  explicit Scheduler(uint32_t threads) : threads_(threads) {}

  void run_block() {
    for (uint32_t i = 0; i < threads_; ++i) {
      Thread& thread = machine.threads[i];
      thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      thread.state = Thread::State::Runnable;
      thread.fiber.start(&run_thread, i);
    }
    unfinished_ = threads_;
    while (unfinished_) {
      bool moved = false;
      for (const uint32_t warp : warp_visits_((threads_ + kWarp - 1) / kWarp)) {
        // A warp runs ahead of the others as far as it can; shuffled, they take turns.
        while (step(warp)) {
          moved = true;
          if (settings.order == Order::Shuffled) break;
        }
      }
      if (!moved) release_block();
    }
    if (!machine.shared.intact())
      throw Fault(blame(machine.threads[0], "the block has written outside of its " + std::to_string(machine.shared.bytes()) +
                                                " bytes of shared memory"));
  }

 private:
  static void run_thread() {
    machine.body(machine.parameters);
    machine.current->state = Thread::State::Exited;
    machine.scheduler.resume(machine.current->fiber);
  }

  void resume(Thread& thread) {
    machine.current = &thread;
    threadIdx = thread.index;
    thread.fiber.resume(machine.scheduler);
    machine.current = nullptr;
    if (machine.overdue) machine.fault = blame(thread, kEndless);
    if (!machine.fault.empty()) throw Fault(std::exchange(machine.fault, {}));
    unfinished_ -= thread.state == Thread::State::Exited;
  }

  Thread& lane(uint32_t warp, uint32_t lane) const { return machine.threads[warp * kWarp + lane]; }
  uint32_t lanes(uint32_t warp) const { return std::min(kWarp, threads_ - warp * kWarp); }

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
      if (thread.state != Thread::State::Waiting || thread.call.whole_block) continue;
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
    return one.state == Thread::State::Waiting && other.state == Thread::State::Waiting && a.whole_block == b.whole_block &&
           a.mask == b.mask && a.site.line() == b.site.line() && a.site.column() == b.site.column() &&
           place_is_same(a.site, b.site);
  }

  static bool place_is_same(const std::source_location& a, const std::source_location& b) {
    return a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name());
  }

  static std::string whereabouts(const Thread& thread) {
    if (thread.state == Thread::State::Exited) return "has exited";
    const std::string mask = thread.call.whole_block ? "" : " with the mask " + std::to_string(thread.call.mask);
    return "waits at " + described(thread.call) + mask;
  }

  // No warp can move: every thread must be at one and the same barrier.
  void release_block() {
    const Thread* first = nullptr;
    for (uint32_t i = 0; i < threads_ && !first; ++i)
      if (machine.threads[i].state == Thread::State::Waiting) first = &machine.threads[i];
    machine.counted = 0;
    for (uint32_t i = 0; i < threads_; ++i) {
      Thread& thread = machine.threads[i];
      if (!together(thread, *first))
        throw Fault(blame(*first, described(first->call) + " waits for thread " + described(thread.index) + ", which " +
                                      whereabouts(thread)));
      machine.counted += thread.given != 0;
    }
    for (uint32_t i = 0; i < threads_; ++i) machine.threads[i].state = Thread::State::Runnable;
  }

  uint32_t threads_;
  uint32_t unfinished_ = 0;
  Visits warp_visits_, lane_visits_;
};

}  // namespace simt
