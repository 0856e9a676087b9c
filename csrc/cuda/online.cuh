// Sums of a row that streams by: relative to the largest logit so far, give or take.
#pragma once

#include "sums.cuh"

namespace sortkd {
namespace cuda {

template <typename T>
struct References {
  T student, teacher;  // -infinity before the first finite logit
  __device__ __forceinline__ void merge(const References& other) {
    student = fmax(student, other.student);
    teacher = fmax(teacher, other.teacher);
  }
};

template <Passes passes, typename T>
struct Online {
  using RowSums = Sums<T, kSums<passes>>;
  Exponents<T> x;
  References<T> at{-kInfinity<T>, -kInfinity<T>};
  RowSums sums{};

  // The same sums relative to other references. With v' = v + d every sum of products of v' expands into those of v.
  __device__ __forceinline__ void rebase(const References<T>& to) {
    const T d_s = at.student == -kInfinity<T> ? T(0) : (at.student - to.student) * x.student;
    const T d_t = at.teacher == -kInfinity<T> ? T(0) : (at.teacher - to.teacher) * x.teacher;
    const T f_s = power_of_two(d_s), f_t = power_of_two(d_t), apart = d_t - d_s;
    T(&of)[kSums<passes>] = sums.of;
    // Sums that vanish beside the others count 0 even where they are infinite.
    if constexpr (passes == Passes::General) {
      of[6] = f_t == T(0) ? T(0) : f_t * (of[6] + d_t * of[2] + apart * of[5] + d_t * apart * of[1]);
      of[5] = f_t == T(0) ? T(0) : f_t * (of[5] + d_t * of[1]);
      of[4] = f_s == T(0) ? T(0) : f_s * (of[4] + d_s * of[0]);
    }
    if constexpr (passes != Passes::Distillation) of[3] *= plain_exponential<passes>(x, d_s, f_s);
    of[2] = f_t == T(0) ? T(0) : f_t * (of[2] + apart * of[1]);
    of[1] *= f_t;
    of[0] *= f_s;
    at = to;
    x.reference_student = finite_or_zero(at.student);
    x.reference_teacher = finite_or_zero(at.teacher);
  }

  // Add n classes; a logit of -infinity on both sides stands for none. References lag behind the largest logit by up to
  // 2^32, for which there is room also at temperature 1, so a thread rebases once or twice a row.
  template <int n>
  __device__ __forceinline__ void add(bool with_ce, const T (&s)[n], const T (&t)[n]) {
    References<T> largest{s[0], t[0]};
#pragma unroll
    for (int i = 1; i < n; ++i) largest.merge({s[i], t[i]});
    constexpr T kRoom = T(32);
    const T steepest = fmax(x.student, x.student * x.plain);
    if ((largest.student - at.student) * steepest > kRoom || (largest.teacher - at.teacher) * x.teacher > kRoom) {
      largest.merge(at);
      rebase(largest);
    }
    // Sums of vectors first: a running sum over 10^5 terms would lose five digits.
    RowSums few{};
#pragma unroll
    for (int i = 0; i < n; ++i) add_class<passes>(few, x, with_ce, s[i], t[i]);
    sums.merge(few);
  }
};

}  // namespace cuda
}  // namespace sortkd
