// What a test may set: the order in which things run that CUDA leaves open, and the device that kernels are told of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace simt {

// Of blocks, of a block's warps and of a warp's lanes between two collectives. A result that differs from one order to
// another lacks a barrier or has blocks that wait for each other.
enum class Order { Forward, Backward, Shuffled };

struct Settings {
  Order order = Order::Forward;
  uint64_t seed = 1;
  int multiprocessors = 2;           // few, so that a grid sized by them must loop
  size_t shared_default = 48 << 10;  // every launch may have this much
  size_t shared_opt_in = 99 << 10;   // sm_86 and sm_89, the smallest of those that we build for
  double seconds = 60;               // of processor time; a launch that takes longer is taken to hang
};

inline Settings settings;

// 0 .. count - 1 in the order that is set, shuffled anew by each call.
class Visits {
 public:
  const std::vector<uint32_t>& operator()(size_t count) {
    places_.resize(count);
    std::iota(places_.begin(), places_.end(), 0);
    if (settings.order == Order::Backward)
      for (auto& place : places_) place = static_cast<uint32_t>(count) - 1 - place;
    if (settings.order == Order::Shuffled)
      for (size_t i = count; i > 1; --i) std::swap(places_[i - 1], places_[random() % i]);
    return places_;
  }

 private:
  static uint64_t random() {  // xorshift64*
    uint64_t& state = settings.seed;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull >> 16;
  }

  std::vector<uint32_t> places_;
};

}  // namespace simt
