// How the kernels reach a row: `count` vectors of W classes; vector g holds the classes from g * W - head on.
#pragma once

#include "loss.h"

namespace sortkd {
namespace cuda {

// Vectors of 16 bytes, wherever the row begins: the vectors at its edges hold classes of its neighbours too. The
// tensors of Params begin at a multiple of 16 bytes, `shift` classes before the first row; their vectors have indices of
// 32 bits.
template <typename X>
struct Vectors {
  using T = float;
  static constexpr int W = kWidth<X>, kAhead = kVectorsAhead;
  const Params<T>& p;
  unsigned first;  // vector
  int head, count;

  SORTKD_DEVICE Vectors(const Params<T>& p, int64_t row) : p(p) {
    // Unsigned: a product of 32 by 32 bits, and quotients by a power of two are shifts.
    const uint64_t at = static_cast<uint64_t>(static_cast<unsigned>(row)) * static_cast<unsigned>(p.C) + p.shift;
    first = static_cast<unsigned>(at / W);
    head = static_cast<int>(at % W);
    count = static_cast<int>(static_cast<unsigned>(head + p.C + W - 1) / W);
  }
  // The vectors that are the row's alone are those from begin() on, before whole(); and the classes that they hold.
  SORTKD_DEVICE int begin() const { return head > 0; }
  SORTKD_DEVICE int whole() const { return static_cast<int>(static_cast<unsigned>(head + p.C) / W); }
  SORTKD_DEVICE bool inner(int g) const { return g >= begin() && g < whole(); }
  SORTKD_DEVICE int before() const { return head > 0 ? W - head : 0; }
  SORTKD_DEVICE int after() const { return max(whole(), begin()) * W - head; }

  SORTKD_DEVICE const uint4* student4(unsigned g) const { return static_cast<const uint4*>(p.student) + (first + g); }
  SORTKD_DEVICE const uint4* teacher4(unsigned g) const { return static_cast<const uint4*>(p.teacher) + (first + g); }
  SORTKD_DEVICE uint4* grad4(unsigned g) const { return static_cast<uint4*>(p.grad) + (first + g); }
  using Raw = uint4;
  using RawTeacher = uint4;
  SORTKD_DEVICE void fetch(unsigned g, Raw& s, Raw& t) const { s = __ldcs(student4(g)), t = __ldcs(teacher4(g)); }
  static SORTKD_DEVICE void unpacked(const Raw& s, const Raw& t, T* x, T* y) { unpack<X>(s, x), unpack<X>(t, y); }
  SORTKD_DEVICE const X* student_at(int c) const { return reinterpret_cast<const X*>(student4(0)) + (c + head); }
  SORTKD_DEVICE const X* teacher_at(int c) const { return reinterpret_cast<const X*>(teacher4(0)) + (c + head); }
  SORTKD_DEVICE T student(int c) const { return widened(*student_at(c)); }
  SORTKD_DEVICE T teacher(int c) const { return widened(*teacher_at(c)); }
  SORTKD_DEVICE void store(unsigned g, const T* grad) const { *grad4(g) = pack<X>(grad); }
  SORTKD_DEVICE void put(int c, T grad) const { reinterpret_cast<X*>(grad4(0))[c + head] = narrowed<X>(grad); }
};

// A class at a time, `inner` apart, of dtypes that the call alone knows. A top-k teacher has no [C]: `teacher` is what
// its absent classes hold.
template <typename Number, bool kTopK>
struct Mixed {
  using T = Number;
  static constexpr int W = 1, head = 0, kAhead = kMixedAhead;
  const Params<T>& p;
  int64_t first;
  T absent;
  int count;

  SORTKD_DEVICE Mixed(const Params<T>& p, int64_t row)
      : p(p), first(row / p.inner * p.C * p.inner + row % p.inner), absent(0), count(p.C) {}
  SORTKD_DEVICE bool inner(int g) const { return static_cast<unsigned>(g) < static_cast<unsigned>(count); }
  SORTKD_DEVICE int before() const { return 0; }
  SORTKD_DEVICE int after() const { return count; }
  using Raw = std::conditional_t<std::is_same_v<T, float>, unsigned, T>;
  using RawTeacher = Raw;
  SORTKD_DEVICE void fetch(unsigned g, Raw& s, Raw& t) const {
    if constexpr (std::is_same_v<T, float>) {
      const int64_t at = first + static_cast<int>(g) * p.inner;
      s = bits_at(p.student, p.student_dtype == Dtype::Float, at);
      if constexpr (!kTopK) t = bits_at(p.teacher, p.teacher_dtype == Dtype::Float, at);
    } else {
      s = student(g), t = teacher(g);
    }
  }
  SORTKD_DEVICE void unpacked(const Raw& s, const Raw& t, T* x, T* y) const {
    if constexpr (std::is_same_v<T, float>) {
      *x = number_of(s, p.student_dtype);
      *y = kTopK ? absent : number_of(t, p.teacher_dtype);
    } else {
      *x = s, *y = t;
    }
  }
  SORTKD_DEVICE T student(int c) const { return element<T>(p.student, p.student_dtype, first + c * p.inner); }
  SORTKD_DEVICE T teacher(int c) const { return kTopK ? absent : element<T>(p.teacher, p.teacher_dtype, first + c * p.inner); }
  SORTKD_DEVICE void store(int g, const T* grad) const { put(g, *grad); }
  SORTKD_DEVICE void put(int c, T grad) const { set_element(p.grad, p.student_dtype, first + c * p.inner, grad); }
};

// A class at a time, `inner` apart, both sides of one dtype. An address is one instruction: a row's beginning, and so
// many bytes a class.
template <typename X>
struct Strided {
  using T = float;
  using Raw = X;
  using RawTeacher = X;
  static constexpr int W = 1, head = 0, kAhead = kClassesAhead;
  const char *students, *teachers;
  char* grads;
  unsigned step;  // bytes from a class to the next one; unsigned: a product of 32 by 32 bits
  int count;

  SORTKD_DEVICE Strided(const Params<T>& p, int64_t row) : step(static_cast<unsigned>(p.inner * sizeof(X))), count(p.C) {
    const int64_t first = (row / p.inner * p.C * p.inner + row % p.inner) * static_cast<int>(sizeof(X));
    students = device_pointer(static_cast<const char*>(p.student) + first);
    teachers = device_pointer(static_cast<const char*>(p.teacher) + first);
    grads = device_pointer(static_cast<char*>(p.grad) + first);
  }
  SORTKD_DEVICE bool inner(int g) const { return static_cast<unsigned>(g) < static_cast<unsigned>(count); }
  SORTKD_DEVICE int before() const { return 0; }
  SORTKD_DEVICE int after() const { return count; }
  SORTKD_DEVICE uint64_t at(int c) const { return static_cast<uint64_t>(static_cast<unsigned>(c)) * step; }
  SORTKD_DEVICE const X& student_at(int c) const { return *reinterpret_cast<const X*>(students + at(c)); }
  SORTKD_DEVICE const X& teacher_at(int c) const { return *reinterpret_cast<const X*>(teachers + at(c)); }
  SORTKD_DEVICE void fetch(int g, X& s, X& t) const { s = student_at(g), t = teacher_at(g); }
  static SORTKD_DEVICE void unpacked(const X& s, const X& t, T* x, T* y) {
    if constexpr (sizeof(X) == 2)  // or both forms would be kept
      *x = widened(X{compiler_barrier(s.bits)}), *y = widened(X{compiler_barrier(t.bits)});
    else
      *x = s, *y = t;
  }
  SORTKD_DEVICE T student(int c) const { return widened(student_at(c)); }
  SORTKD_DEVICE T teacher(int c) const { return widened(teacher_at(c)); }
  SORTKD_DEVICE void store(int g, const T* grad) const { put(g, *grad); }
  SORTKD_DEVICE void put(int c, T grad) const { *reinterpret_cast<X*>(grads + at(c)) = narrowed<X>(grad); }
};

// Rows of whole aligned vectors, of two dtypes; Y void: of a top-k teacher.
template <typename X, typename Y>
struct WholeVectors {
  using T = float;
  static constexpr bool kTopK = std::is_void_v<Y>;
  static constexpr int W = kTopK ? kWidth<X> : 4, head = 0, kAhead = kWholeVectorsAhead;
  template <typename Z>
  using RawOf = std::conditional_t<sizeof(Z) * W == 16, uint4, uint2>;
  using Teacher = std::conditional_t<kTopK, X, Y>;
  using Raw = RawOf<X>;
  using RawTeacher = RawOf<Teacher>;
  const Params<T>& p;
  int64_t first;  // vector
  T absent;
  int count;

  SORTKD_DEVICE WholeVectors(const Params<T>& p, int64_t row) : p(p), first(row * (p.C / W)), absent(0), count(p.C / W) {}
  SORTKD_DEVICE bool inner(int g) const { return static_cast<unsigned>(g) < static_cast<unsigned>(count); }
  SORTKD_DEVICE int before() const { return 0; }
  SORTKD_DEVICE int after() const { return p.C; }
  SORTKD_DEVICE const Raw* students() const { return static_cast<const Raw*>(p.student) + first; }
  SORTKD_DEVICE const RawTeacher* teachers() const { return static_cast<const RawTeacher*>(p.teacher) + first; }
  SORTKD_DEVICE Raw* grads() const { return static_cast<Raw*>(p.grad) + first; }
  SORTKD_DEVICE void fetch(int g, Raw& s, RawTeacher& t) const {
    s = __ldcs(students() + g);
    if constexpr (!kTopK) t = __ldcs(teachers() + g);
  }
  SORTKD_DEVICE void unpacked(const Raw& s, const RawTeacher& t, T* x, T* y) const {
    unpack<X>(s, x);
    if constexpr (!kTopK) {
      unpack<Teacher>(t, y);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) y[i] = absent;
    }
  }
  SORTKD_DEVICE T student(int c) const { return widened(reinterpret_cast<const X*>(students())[c]); }
  SORTKD_DEVICE T teacher(int c) const {
    if constexpr (kTopK)
      return absent;
    else
      return widened(reinterpret_cast<const Teacher*>(teachers())[c]);
  }
  SORTKD_DEVICE void store(int g, const T* grad) const {
    if constexpr (sizeof(Raw) == 16) {
      grads()[g] = pack<X>(grad);
    } else {
      const T eight[8] = {grad[0], grad[1], grad[2], grad[3]};
      const uint4 packed = pack<X>(eight);
      grads()[g] = make_uint2(packed.x, packed.y);
    }
  }
  SORTKD_DEVICE void put(int c, T grad) const { reinterpret_cast<X*>(grads())[c] = narrowed<X>(grad); }
};

// f(c) for the classes before `before` and from `after` on, which no thread stores in whole vectors. From memory again: in few
// instructions, and where the gradient lies is theirs alone.
template <typename G, typename F>
SORTKD_DEVICE void each_edge(const G& group, int C, int before, int after, F&& f) {
  const int edges = before + C - after;
#pragma unroll 1
  for (int i = group.member; i < edges; i += group.size) {
    const int c = i < before ? i : after + i - before;
    if (c < C) f(c);
  }
}

// Of vectors that are loaded as they are, a logit.
template <class A>
struct LogitOf {
  using Type = Half;
};
template <typename X>
struct LogitOf<Vectors<X>> {
  using Type = X;
};

template <class A>
constexpr bool kIsMixed = false;
template <typename T, bool kTopK>
constexpr bool kIsMixed<Mixed<T, kTopK>> = true;

}  // namespace cuda
}  // namespace sortkd
