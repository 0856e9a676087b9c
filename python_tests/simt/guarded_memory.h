// Global memory that ends right before a page that nobody may touch: a kernel that reads or writes past a tensor is
// caught at once. It starts at 16 bytes, as an allocation on a GPU does at 256, so up to 15 bytes behind the tensor are
// NaN instead, and they and those before the tensor must stay as they are.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

namespace simt {

class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : page_(sysconf(_SC_PAGESIZE)), bytes_(bytes) {
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    usable_ = (rounded + page_) / page_ * page_;  // something before the tensor, too
    void* memory = mmap(nullptr, usable_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_ + usable_, page_, PROT_NONE);
    data_ = memory_ + usable_ - rounded;
    fill(before(), data_);
    fill(data_ + bytes, memory_ + usable_);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(memory_, usable_ + page_); }

  void* data() const { return data_; }

  // Whether nobody has written around the tensor.
  bool intact() const { return untouched(before(), data_) && untouched(data_ + bytes_, memory_ + usable_); }

 private:
  static constexpr size_t kAlignment = 16, kBefore = 256;

  char* before() const { return std::max(memory_, data_ - kBefore); }

  // By address, so that a half, a bfloat16, a float and a double are NaN; as in shared_memory.h.
  static char poison(const char* byte) { return static_cast<char>(reinterpret_cast<uintptr_t>(byte) % 2 ? 0x7f : 0xf5); }
  static void fill(char* from, char* to) {
    for (; from < to; ++from) *from = poison(from);
  }
  static bool untouched(const char* from, const char* to) {
    for (; from < to; ++from)
      if (*from != poison(from)) return false;
    return true;
  }

  size_t page_, bytes_, usable_;
  char *memory_, *data_;
};

}  // namespace simt
