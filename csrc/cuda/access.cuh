// Where the classes of a row lie and which of them a thread holds: its k-th vector of kWidth classes, k = 0 .. steps.
//
// Peeled: both sides of one dtype, rows contiguous. Vectors of 16 aligned bytes; what lies before the first and behind
// the last of them, the edges, is at most 2 (kWidth - 1) classes, of which each thread of the group holds one.
// Scattered: any dtypes, classes any distance apart. One access a class; neighbouring threads hold neighbouring
// classes.
#pragma once

#include "row.cuh"
#include "vector.cuh"

namespace sortkd {
namespace cuda {

constexpr int kNotHeld = -1;

template <typename X_>
struct Peeled {
  using X = X_;
  using T = Acc<X>;
  static constexpr int kWidth = Vector<X>::kWidth;
  static constexpr bool kEdges = true;

  const X* student;
  const X* teacher;
  X* grad;
  int C, size, member, head, vectors, edges, steps;

  __device__ __forceinline__ Peeled(const LossParams<T>& p, const RowHead<T>& row, const Group& group)
      : student(static_cast<const X*>(p.student) + row.offset),
        teacher(static_cast<const X*>(p.teacher) + row.offset),
        grad(static_cast<X*>(p.grad_student) + row.offset),
        C(p.C),
        size(group.size),
        member(group.member) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(student) % 16);
    head = min(C, (16 - past) % 16 / static_cast<int>(sizeof(X)));
    vectors = (C - head) / kWidth;
    edges = C - vectors * kWidth;
    steps = (vectors + size - 1) / size;
  }

  __device__ __forceinline__ bool holds(int k, int) const { return k * size + member < vectors; }
  __device__ __forceinline__ int class_of(int k, int i) const { return head + (k * size + member) * kWidth + i; }
  __device__ __forceinline__ int edge_class() const {
    return member >= edges ? kNotHeld : member < head ? member : member + vectors * kWidth;
  }
  // Where a class is: k * kWidth + i in the thread that holds it, `edge` if it is an edge, kNotHeld in all others.
  __device__ __forceinline__ int slot_of(int c, int edge) const {
    const int place = c - head;
    if (place < 0 || place >= vectors * kWidth) return edge_class() == c ? edge : kNotHeld;
    const int vector = place / kWidth;
    return vector % size == member ? vector / size * kWidth + place % kWidth : kNotHeld;
  }

  __device__ __forceinline__ T student_one(int c) const { return widened(student[c]); }
  __device__ __forceinline__ T teacher_one(int c) const { return widened(teacher[c]); }
  __device__ __forceinline__ void store_one(int c, T g) const { grad[c] = narrowed<X>(g); }

  __device__ __forceinline__ Vector<X> vector_at(const X* side, int k, bool live, bool once) const {
    if (live && holds(k, 0)) return load_vector(side + class_of(k, 0), once);
    Vector<X> nothing;
    nothing.fill(-kInfinity<T>);
    return nothing;
  }
  __device__ __forceinline__ Vector<X> student_at(int k) const { return vector_at(student, k, true, false); }
  __device__ __forceinline__ Vector<X> teacher_at(int k) const { return vector_at(teacher, k, true, false); }
  __device__ __forceinline__ void store_at(int k, const Vector<X>& g) const {
    if (holds(k, 0)) store_vector(grad + class_of(k, 0), g);
  }

  template <int n>
  __device__ __forceinline__ void load_all(Vector<X> (&s)[n], Vector<X> (&t)[n], bool live) const {
#pragma unroll
    for (int k = 0; k < n; ++k) s[k] = vector_at(student, k, live, true);
#pragma unroll
    for (int k = 0; k < n; ++k) t[k] = vector_at(teacher, k, live, true);
  }
  template <int n>
  __device__ __forceinline__ void store_all(const Vector<X> (&g)[n]) const {
#pragma unroll
    for (int k = 0; k < n; ++k) store_at(k, g[k]);
  }
};

template <typename T_>
struct Scattered {
  using X = T_;
  using T = T_;
  static constexpr int kWidth = Vector<X>::kWidth;
  static constexpr bool kEdges = false;
  static constexpr int edges = 0;

  struct Side {
    char* base;
    Dtype dtype;
    int64_t stride;
  };
  Side student, teacher, grad;
  int C, size, member, steps;

  static __device__ __forceinline__ Side side(const void* base, Dtype dtype, int64_t offset, int64_t stride) {
    const int bytes = dtype == Dtype::Double ? 8 : dtype == Dtype::Float ? 4 : 2;
    return {const_cast<char*>(static_cast<const char*>(base)) + offset * bytes, dtype, stride};
  }

  __device__ __forceinline__ Scattered(const LossParams<T>& p, const RowHead<T>& row, const Group& group)
      : student(side(p.student, p.student_dtype, row.offset, p.inner)),
        teacher(side(p.teacher, p.teacher_dtype, row.offset, p.inner)),
        grad(side(p.grad_student, p.student_dtype, row.offset, p.inner)),
        C(p.C),
        size(group.size),
        member(group.member),
        steps((p.C + kWidth * group.size - 1) / (kWidth * group.size)) {
    if (p.dense) {
      constexpr Dtype dtype = sizeof(T) == 8 ? Dtype::Double : Dtype::Float;
      teacher = side(p.dense, dtype, static_cast<int64_t>(blockIdx.x) * p.C, 1);
    }
  }

  // f(y) with the side's memory in its own type: one branch for many accesses.
  template <typename F>
  static __device__ __forceinline__ void typed(const Side& side, F&& f) {
    if (side.dtype == Dtype::Float) return f(reinterpret_cast<float*>(side.base));
    if (side.dtype == Dtype::BFloat16) return f(reinterpret_cast<BFloat16*>(side.base));
    if (side.dtype == Dtype::Half) return f(reinterpret_cast<Half*>(side.base));
    if constexpr (sizeof(T) == 8) f(reinterpret_cast<double*>(side.base));
  }

  __device__ __forceinline__ bool holds(int k, int i) const { return class_of(k, i) < C; }
  __device__ __forceinline__ int class_of(int k, int i) const { return (k * kWidth + i) * size + member; }
  __device__ __forceinline__ int edge_class() const { return kNotHeld; }
  __device__ __forceinline__ int slot_of(int c, int) const { return c % size == member ? c / size : kNotHeld; }

  static __device__ __forceinline__ T one(const Side& side, int c) {
    T value{};
    typed(side, [&](const auto* y) { value = static_cast<T>(widened(y[c * side.stride])); });
    return value;
  }
  __device__ __forceinline__ T student_one(int c) const { return one(student, c); }
  __device__ __forceinline__ T teacher_one(int c) const { return one(teacher, c); }
  __device__ __forceinline__ void store_one(int c, T g) const {
    typed(grad, [&](auto* y) { y[c * grad.stride] = narrowed<std::decay_t<decltype(*y)>>(g); });
  }

  template <int n>
  __device__ __forceinline__ void load_side(const Side& side, Vector<X>* v, int first, bool live) const {
    typed(side, [&](const auto* y) {
#pragma unroll
      for (int k = 0; k < n; ++k)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const int c = class_of(first + k, i);
          v[k].set(i, live && c < C ? static_cast<T>(widened(y[c * side.stride])) : -kInfinity<T>);
        }
    });
  }
  template <int n>
  __device__ __forceinline__ void store_side(const Vector<X>* g, int first) const {
    typed(grad, [&](auto* y) {
#pragma unroll
      for (int k = 0; k < n; ++k)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const int c = class_of(first + k, i);
          if (c < C) y[c * grad.stride] = narrowed<std::decay_t<decltype(*y)>>(g[k].get(i));
        }
    });
  }
  __device__ __forceinline__ Vector<X> student_at(int k) const {
    Vector<X> v{};
    load_side<1>(student, &v, k, true);
    return v;
  }
  __device__ __forceinline__ Vector<X> teacher_at(int k) const {
    Vector<X> v{};
    load_side<1>(teacher, &v, k, true);
    return v;
  }
  __device__ __forceinline__ void store_at(int k, const Vector<X>& g) const { store_side<1>(&g, k); }

  template <int n>
  __device__ __forceinline__ void load_all(Vector<X> (&s)[n], Vector<X> (&t)[n], bool live) const {
    load_side<n>(student, s, 0, live);
    load_side<n>(teacher, t, 0, live);
  }
  template <int n>
  __device__ __forceinline__ void store_all(const Vector<X> (&g)[n]) const {
    store_side<n>(g, 0);
  }
};

}  // namespace cuda
}  // namespace sortkd
