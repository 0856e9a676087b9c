// While a kernel runs, an access to memory that is not there, a division by zero and a launch that does not end are
// faults of its current thread, not the end of the process.
#pragma once

#include <pthread.h>
#include <sys/time.h>

#include <cmath>
#include <csignal>
#include <vector>

#include "machine.h"

namespace simt {

class Signals {
 public:
  Signals() {
    owner() = pthread_self();
    machine.overdue = 0;
    // A stack of their own: the thread's may be what has run out.
    static std::vector<char> memory(64 << 10);
    stack_t stack{};
    stack.ss_sp = memory.data();
    stack.ss_size = memory.size();
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = &on_signal;
    // The handler never returns from a fault, so the signal must not stay blocked until it does.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kCount; ++i) sigaction(kNumbers[i], &action, &before_[i]);
    set_timer(settings.seconds);
  }

  ~Signals() {
    set_timer(0);
    for (int i = 0; i < kCount; ++i) sigaction(kNumbers[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr int kCount = 4;
  static constexpr int kNumbers[kCount] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};

  static pthread_t& owner() {
    static pthread_t thread;
    return thread;
  }

  static void set_timer(double seconds) {
    const double whole = std::floor(seconds);
    itimerval timer{};
    timer.it_value.tv_sec = static_cast<time_t>(whole);
    timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - whole) * 1e6);
    timer.it_interval.tv_usec = seconds ? 100000 : 0;
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }

  static void on_signal(int number, siginfo_t* info, void*) {
    if (number == SIGVTALRM) {
      // The scheduler sees the first alarm within microseconds; a later one finds a thread that never gets there.
      if (!machine.overdue)
        machine.overdue = 1;
      else if (!pthread_equal(pthread_self(), owner()))
        pthread_kill(owner(), number);
      else if (machine.current)
        fail(kEndless);
    } else if (!machine.current || !pthread_equal(pthread_self(), owner())) {
      std::signal(number, SIG_DFL);  // not a kernel's doing: it happens again, and ends the process as it should
    } else {
      fail(number == SIGFPE ? "integer division by zero" : outside(info->si_addr));
    }
  }

  static std::string outside(const void* address) {
    if (machine.current->fiber.overflowed_at(address)) return "stack overflow";
    for (const SharedMemory& shared : machine.shared) {
      if (!shared.guards(address)) continue;
      const auto offset = static_cast<const char*>(address) - shared.base();
      return "access outside of shared memory, at byte " + std::to_string(offset) + " of " + std::to_string(shared.bytes());
    }
    return "access outside of global memory";
  }

  struct sigaction before_[kCount];
  stack_t stack_before_;
};

}  // namespace simt
