// Shuffles, votes and barriers. Each notes where it is called, since all lanes of its mask must be at the same call.
#pragma once

#include <bit>
#include <type_traits>

#include "scheduler.h"

namespace simt {

using Site = std::source_location;

inline uint32_t linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline uint32_t lane_id() { return linear_thread() % kWarp; }

// All lanes of the mask, each with a value that the others may then read.
inline void meet(const char* name, uint32_t mask, uint64_t given, const Site& site) {
  if (!(mask >> lane_id() & 1))
    fail(described({name, Awaits::Lanes, mask, site}) + " is called by a lane that is not in its mask " + std::to_string(mask));
  wait_at({name, Awaits::Lanes, mask, site}, given);
}

inline uint64_t taken_from(uint32_t lane) {
  const auto current = static_cast<uint32_t>(machine.current - machine.threads);
  return machine.threads[current / kWarp * kWarp + lane].taken;
}

template <typename T>
T shuffle(const char* name, uint32_t mask, T value, uint32_t source, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "what __shfl_sync takes");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  meet(name, mask, std::bit_cast<Bits>(value), site);
  if (!(mask >> source & 1))
    fail(described({name, Awaits::Lanes, mask, site}) + " reads lane " + std::to_string(source) +
         ", which is not in the mask " + std::to_string(mask));
  return std::bit_cast<T>(static_cast<Bits>(taken_from(source)));
}

inline uint32_t ballot(const char* name, uint32_t mask, int predicate, const Site& site) {
  meet(name, mask, predicate != 0, site);
  uint32_t votes = 0;
  for (uint32_t lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1 && taken_from(lane)) votes |= 1u << lane;
  return votes;
}

// The number of threads whose `given` is true.
inline int whole_block(const char* name, bool given, const Site& site) {
  wait_at({name, Awaits::Block, 0, site}, given);
  return static_cast<int>(machine.current->taken);
}

inline void check_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("a shuffle of width " + std::to_string(width));
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::current()) {
  simt::check_width(width);
  const unsigned group = simt::lane_id() & ~(width - 1u);
  return simt::shuffle("__shfl_sync", mask, value, group | (source & (width - 1)), site);
}

// Beyond the group of `width` lanes, the three below give a lane its own value.
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::current()) {
  simt::check_width(width);
  const unsigned lane = simt::lane_id(), place = lane & (width - 1);
  return simt::shuffle("__shfl_up_sync", mask, value, delta > place ? lane : lane - delta, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::current()) {
  simt::check_width(width);
  const unsigned lane = simt::lane_id(), place = lane & (width - 1);
  return simt::shuffle("__shfl_down_sync", mask, value, delta >= width - place ? lane : lane + delta, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Site site = simt::Site::current()) {
  simt::check_width(width);
  // A group of higher lanes is out of reach, one of lower lanes is not.
  const unsigned lane = simt::lane_id(), source = lane ^ lane_mask, end = (lane & ~(width - 1u)) + width;
  return simt::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__ballot_sync", mask, predicate, site);
}

inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__any_sync", mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__all_sync", mask, predicate, site) == mask;
}

// The lanes whose value is this one's.
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::current()) {
  simt::meet("__match_any_sync", mask, static_cast<uint64_t>(value), site);
  unsigned same = 0;
  for (uint32_t lane = 0; lane < simt::kWarp; ++lane)
    if (mask >> lane & 1 && simt::taken_from(lane) == static_cast<uint64_t>(value)) same |= 1u << lane;
  return same;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::meet("__syncwarp", mask, 0, site);
}

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::whole_block("__syncthreads", false, site); }

inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::whole_block("__syncthreads_count", predicate != 0, site);
}

inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::whole_block("__syncthreads_or", predicate != 0, site) != 0;
}

inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::whole_block("__syncthreads_and", predicate == 0, site) == 0;
}
