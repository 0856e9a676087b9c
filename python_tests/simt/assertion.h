// `assert` in a kernel is a fault of its thread. Elsewhere it is what it always is.
#pragma once

#include <cassert>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

// What glibc's `assert` calls; hidden and weak as in sanitizer.h.
extern "C" [[gnu::weak, gnu::visibility("hidden"), noreturn]] void __assert_fail(const char* condition, const char* file,
                                                                                 unsigned line, const char*) noexcept {
  const std::string text = std::string("assertion ") + condition + " (" + simt::place_of(file, line) + ")";
  if (simt::machine.current) simt::fail(text);
  std::fprintf(stderr, "%s failed\n", text.c_str());
  std::abort();
}
