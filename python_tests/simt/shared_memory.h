// The shared memory of the block that runs: exactly as many bytes as the launch asked for, right before pages that
// nobody may touch, and after bytes that nobody may change.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace simt {

class SharedMemory {
 public:
  static constexpr size_t kMost = 256 << 10;
  static constexpr size_t kAlignment = 16;

  // A new block starts, its memory full of NaN.
  char* begin(size_t bytes) {
    if (!memory_) allocate();
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    base_ = memory_ + kGuard + kMost - rounded;
    bytes_ = bytes;
    std::memset(base_ - before(), kCanary, before());
    // NaN as a double, as a float, as a half and as a bfloat16; far outside of any array as an index.
    constexpr uint16_t kPoison = 0x7ff5;
    std::fill_n(reinterpret_cast<uint16_t*>(base_), bytes / 2, kPoison);
    std::memset(base_ + bytes, kCanary, rounded - bytes);
    return base_;
  }

  char* base() const { return base_; }
  size_t bytes() const { return bytes_; }

  // Whether the block that ended has written to no byte that is not its own.
  bool intact() const {
    const char* end = memory_ + kGuard + kMost;
    const auto kept = [](char byte) { return byte == kCanary; };
    return std::all_of(base_ - before(), base_, kept) && std::all_of(base_ + bytes_, const_cast<char*>(end), kept);
  }

  bool guards(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return memory_ && byte >= memory_ && byte < memory_ + 2 * kGuard + kMost;
  }

 private:
  static constexpr size_t kGuard = 1 << 20;
  static constexpr char kCanary = 0x5a;

  size_t before() const { return std::min<size_t>(1024, base_ - memory_ - kGuard); }

  void allocate() {
    void* memory = mmap(nullptr, 2 * kGuard + kMost, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_ + kGuard, kMost, PROT_READ | PROT_WRITE);
  }

  char* memory_ = nullptr;
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace simt
