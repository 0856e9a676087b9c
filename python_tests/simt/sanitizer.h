// What the compiler calls where -fsanitize=alignment,bounds,shift finds something: a misaligned access, an index
// outside of a local array, a shift by too much. The sanitizer's own library would end the process; here it is a fault.
#pragma once

#include "machine.h"

namespace simt {

// The compiler's records, as far as they are read.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

struct Misaligned {
  SourceLocation place;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};

struct OutOfBounds {
  SourceLocation place;
  const TypeDescriptor *array, *index;
};

[[noreturn]] inline void fail_at(const SourceLocation& place, const std::string& deed) {
  const std::string text = deed + " (" + place_of(place.file, place.line) + ")";
  if (machine.current) fail(text);
  throw Fault(text);  // in a launcher
}

}  // namespace simt

// Weak, so that every source may have them; hidden, so that no sanitized library of the process calls them.
#define SIMT_HANDLER extern "C" [[gnu::weak, gnu::used, gnu::visibility("hidden"), noreturn]] void

SIMT_HANDLER __ubsan_handle_type_mismatch_v1_abort(const simt::Misaligned* what, uintptr_t pointer) {
  const uintptr_t off = pointer & ((uintptr_t{1} << what->log_alignment) - 1);
  simt::fail_at(what->place, std::string("misaligned access to ") + what->type->name + ", " + std::to_string(off) +
                                 " bytes past a multiple of " + std::to_string(1 << what->log_alignment));
}

SIMT_HANDLER __ubsan_handle_out_of_bounds_abort(const simt::OutOfBounds* what, uintptr_t index) {
  simt::fail_at(what->place,
                std::string("index ") + std::to_string(static_cast<intptr_t>(index)) + " outside of " + what->array->name);
}

SIMT_HANDLER __ubsan_handle_shift_out_of_bounds_abort(const simt::SourceLocation* place, uintptr_t, uintptr_t by) {
  simt::fail_at(*place, "shift by " + std::to_string(static_cast<intptr_t>(by)));
}

#undef SIMT_HANDLER
