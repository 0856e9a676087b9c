// A row that its threads hold in registers, as it lies in memory: every logit is loaded once.
#pragma once

#include "access.cuh"
#include "choices.h"
#include "sums.cuh"

namespace sortkd {
namespace cuda {

// The largest logits of both sides beside the label, and how many classes of the teacher are above it.
template <typename T>
struct Extremes {
  T student, teacher;
  Count above;
  int unused;  // a whole number of words for double, too
  __device__ __forceinline__ void merge(const Extremes& other) {
    student = fmax(student, other.student);
    teacher = fmax(teacher, other.teacher);
    above.merge(other.above);
  }
};

// A set of the slots of a thread. One slot is a set, too: compared as a number, the compiler would take the number for
// the index it equals, and registers have no indices.
template <int n>
struct Slots {
  static constexpr int kWords = n / 32 + 1;
  unsigned word[kWords] = {};

  static __device__ __forceinline__ Slots of(int slot) {
    Slots slots;
#pragma unroll
    for (int w = 0; w < kWords; ++w) slots.word[w] = slot >= 32 * w && slot < 32 * w + 32 ? 1u << slot % 32 : 0u;
    return slots;
  }
  __device__ __forceinline__ bool has(int slot) const { return word[slot / 32] >> slot % 32 & 1; }
  __device__ __forceinline__ bool has_any(int first, int count) const {
    return word[first / 32] >> first % 32 & ((1u << count) - 1);
  }
  __device__ __forceinline__ void add(int slot, bool it) { word[slot / 32] |= static_cast<unsigned>(it) << slot % 32; }
  __device__ __forceinline__ void remove(const Slots& others) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] &= ~others.word[w];
  }
};

template <typename Access>
struct Tile {
  using X = typename Access::X;
  using T = typename Access::T;
  static constexpr int kVectors = kVectorsHeld;
  static constexpr int kWidth = Access::kWidth;
  static constexpr int kEdge = kVectors * kWidth;  // the slot of the one class outside the vectors
  using Set = Slots<kEdge>;

  const Access access;
  const int used;  // vectors that some thread holds
  Vector<X> s[kVectors], t[kVectors];
  T s_edge, t_edge;

  __device__ __forceinline__ Tile(const Access& access, int used, bool live) : access(access), used(used) {
    access.load_all(s, t, live);
    s_edge = t_edge = -kInfinity<T>;
    const int c = live ? access.edge_class() : kNotHeld;
    if (Access::kEdges && c != kNotHeld) {
      s_edge = access.student_one(c);
      t_edge = access.teacher_one(c);
    }
  }

  // f(k) for the vectors, f(k, i) for their slots; all indices are constants.
  template <typename F>
  __device__ __forceinline__ void for_vectors(F&& f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (k < used) f(k);
  }
  template <typename F>
  __device__ __forceinline__ void for_slots(F&& f) const {
    for_vectors([&](int k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) f(k, i);
    });
  }
  template <typename F>
  __device__ __forceinline__ void for_classes(F&& f) const {
    for_slots([&](int k, int i) { f(s[k].get(i), t[k].get(i)); });
    if (Access::kEdges) f(s_edge, t_edge);
  }

  // Between passes: halves are unpacked anew.
  __device__ __forceinline__ void forget() {
    if (sizeof(X) == 2) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        s[k].hide_words();
        t[k].hide_words();
      }
    }
  }

  __device__ __forceinline__ void set_student(const Set& slot, T value) { set(s, s_edge, slot, value); }
  __device__ __forceinline__ void set_teacher(const Set& slot, T value) { set(t, t_edge, slot, value); }

  __device__ __forceinline__ Extremes<T> extremes(T label_value) const {
    Extremes<T> e{-kInfinity<T>, -kInfinity<T>, {0}, 0};
    for_classes([&](T s, T t) {
      e.student = fmax(e.student, s);
      e.teacher = fmax(e.teacher, t);
      e.above.n += t > label_value;
    });
    return e;
  }

  // Mean and unbiased deviation of both sides, relative to the label's logits: those of a constant row are exactly 0.
  __device__ __forceinline__ void spread(Group& group, T student_label, T teacher_label, Spread<T>& of_student,
                                         Spread<T>& of_teacher) const {
    const T n = static_cast<T>(access.C);
    const auto add = [&](Sums<T, 2>& sums, auto term) {
      for_slots([&](int k, int i) {
        if (!access.holds(k, i)) return;
        sums.of[0] += term(s[k].get(i) - student_label, 0);
        sums.of[1] += term(t[k].get(i) - teacher_label, 1);
      });
      if (Access::kEdges && access.edge_class() != kNotHeld) {
        sums.of[0] += term(s_edge - student_label, 0);
        sums.of[1] += term(t_edge - teacher_label, 1);
      }
      sums = group.merged(sums);
    };
    Sums<T, 2> sums{}, squares{};
    add(sums, [](T d, int) { return d; });
    const T mean[2] = {sums.of[0] / n, sums.of[1] / n};
    add(squares, [&](T d, int side) { return (d - mean[side]) * (d - mean[side]); });
    const T freedom = static_cast<T>(max(access.C - 1, 1));
    of_student = {student_label + mean[0], sqrt(squares.of[0] / freedom)};
    of_teacher = {teacher_label + mean[1], sqrt(squares.of[1] / freedom)};
  }

  // The gradient in the student's place, as it will be stored.
  template <typename F>
  __device__ __forceinline__ void replace_student(F&& gradient) {
    for_vectors([&](int k) {
      const Vector<X> from = s[k];
      s[k].assign([&](int i) { return gradient(from.get(i), t[k].get(i)); });
    });
    if (Access::kEdges) s_edge = gradient(s_edge, t_edge);
  }

  __device__ __forceinline__ void store() const {
    access.store_all(s);
    const int c = access.edge_class();
    if (Access::kEdges && c != kNotHeld) access.store_one(c, s_edge);
  }

 private:
  __device__ __forceinline__ void set(Vector<X> (&v)[kVectors], T& edge, const Set& slot, T value) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (slot.has_any(k * kWidth, kWidth)) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          if (slot.has(k * kWidth + i)) v[k].set(i, value);
      }
    if (Access::kEdges && slot.has(kEdge)) edge = value;
  }
};

}  // namespace cuda
}  // namespace sortkd
