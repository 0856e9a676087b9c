// A fiber: a stack of its own and the place where it stopped. A CUDA thread runs on one, so that it can stop in the
// middle of a shuffle and let the other lanes arrive. A fiber that is never resumed costs nothing: its stack is used
// again.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__)
#define SIMT_UCONTEXT  // defined on the command line it serves to test this path
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

#if !defined(SIMT_UCONTEXT)
// Notes in `*from` where this stack stopped and goes on where `to` did. swapcontext would make a system call for the
// signal mask. In line, and by a jump: a processor predicts a return from the calls that it has seen, and after a call
// on one stack and a return on another it would be wrong about all that follow.
[[gnu::always_inline]] inline void switch_stacks(void** from, void* to) {
  asm volatile(
      "lea -128(%%rsp), %%rsp\n"  // what the function keeps below its stack pointer
      "push %%rbp\n"
      "lea 1f(%%rip), %%rax\n"
      "push %%rax\n"
      "mov %%rsp, (%0)\n"
      "mov %1, %%rsp\n"
      "pop %%rax\n"
      "jmp *%%rax\n"
      "1: pop %%rbp\n"
      "lea 128(%%rsp), %%rsp\n"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3",
        "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
}
#endif

class Fiber {
 public:
  // The caller's own stack, as a place to come back to.
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (memory_) munmap(memory_, kGuard + kStack);
  }

  // The next switch to this fiber calls `entry`, which must never return. `colour`: small and different for neighbours,
  // or the hot end of every stack lies in the same sets of the cache.
  void start(void (*entry)(), size_t colour) {
    if (!memory_) allocate();
    char* top = memory_ + kGuard + kStack - colour % 16 * 192;
#if !defined(SIMT_UCONTEXT)
    auto** words = reinterpret_cast<void**>(top);
    words[-1] = nullptr;  // where `entry` would return to
    words[-2] = reinterpret_cast<void*>(entry);
    stopped_ = words - 2;
#else
    getcontext(&stopped_);
    stopped_.uc_stack.ss_sp = memory_ + kGuard;
    stopped_.uc_stack.ss_size = top - memory_ - kGuard;
    makecontext(&stopped_, entry, 0);
#endif
  }

  // Stops `from`, on which this is called, and goes on with this one.
  [[gnu::always_inline]] void resume(Fiber& from) {
#if !defined(SIMT_UCONTEXT)
    switch_stacks(&from.stopped_, stopped_);
#else
    swapcontext(&from.stopped_, &stopped_);
#endif
  }

  // Whether the address lies right below the stack: the stack has overflowed.
  bool overflowed_at(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return memory_ && byte >= memory_ && byte < memory_ + kGuard;
  }

 private:
  static constexpr size_t kStack = 64 << 10, kGuard = 64 << 10;  // multiples of every page size in use

  // Pages come when they are touched, so a thousand stacks take the memory of what they use.
  void allocate() {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, kGuard, PROT_NONE);
  }

  char* memory_ = nullptr;
#if !defined(SIMT_UCONTEXT)
  void* stopped_ = nullptr;
#else
  ucontext_t stopped_;
#endif
};

}  // namespace simt
