// The loss and gradient of rows that fit in registers.
#pragma once

#include "choices.h"
#include "walk.cuh"

namespace sortkd {
namespace cuda {

template <typename Access, bool general>
constexpr int kTileThreads = most_tile_threads(sizeof(typename Access::T) == 8, general, Access::kEdges);

// One row a group of threads: see Group. Rows of a rank over p.settled are left to sort_kd_stream. `general`: the
// kernel of Passes::General, which the others need not carry.
template <typename Access, bool general>
__global__ void __launch_bounds__(kTileThreads<Access, general>, 1)
    sort_kd_tile(const __grid_constant__ LossParams<typename Access::T> p) {
  using T = typename Access::T;
  Group group = Group::of(p.group, p.step);
  int64_t row = blockIdx.x;
  if (!group.wide()) {
    const int in_warp = p.step > 1 ? threadIdx.x % p.step : threadIdx.x % 32 / p.group;
    row = row * (blockDim.x / p.group) + threadIdx.x / 32 * (32 / p.group) + in_warp;
  }
  const RowHead<T> head = read_head(p, row);
  const Access access(p, head, group);
  Tile<Access> tile(access, p.used, head.counts);
  const T student_label = head.counts ? access.student_one(head.label) : T(0);
  const T teacher_label = head.counts ? access.teacher_one(head.label) : T(0);

  Spread<T> of_student{}, of_teacher{};
  if (general && p.standardize) tile.spread(group, student_label, teacher_label, of_student, of_teacher);

  // From here on the label is no class among the others.
  using Set = typename Tile<Access>::Set;
  const Set label_slot = Set::of(head.counts ? access.slot_of(head.label, Tile<Access>::kEdge) : kNotHeld);
  tile.set_student(label_slot, -kInfinity<T>);
  tile.set_teacher(label_slot, -kInfinity<T>);
  tile.forget();
  const Extremes<T> extremes = group.merged(tile.extremes(teacher_label));
  tile.forget();
  const int rank = extremes.above.n;
  const bool moves = p.correction != Correction::None && rank > 0;
  const bool settled = p.correction != Correction::Sort || rank <= p.settled;
  if (head.inside && !settled && group.member == 0) p.left[atomicAdd(p.left_count, 1u)] = row;
  const bool done = head.inside && settled;
  if (!__any_sync(kFullMask, done)) return;

  Corrected<T> teacher{teacher_label, extremes.teacher};
  if (__any_sync(kFullMask, moves)) {
    const int steps = !moves || !settled ? 0 : p.correction == Correction::Sort ? rank : min(rank, 2);
    teacher = walk(tile, group, p.correction, steps ? rank : 0, steps, teacher);
    tile.forget();
  }

  Exponents<T> x = exponents_of<general>(p, head.temperature, of_student.deviation, of_teacher.deviation);
  x.reference_student = finite_or_zero(extremes.student);
  x.reference_teacher = finite_or_zero(teacher.largest_other);
  with_passes<general>(p.passes, [&](auto passes) {
    constexpr Passes kPasses = decltype(passes)::value;
    Sums<T, kSums<kPasses>> sums{};
    tile.for_classes([&](T s, T t) { add_class<kPasses>(sums, x, p.with_ce, s, t); });
    sums = group.merged(sums);
    tile.forget();
    const RowSums<T> totals = row_sums(sums, x, student_label, teacher.label_value);
    const Coefficients<T> c = finish_row<general>(p, head, totals, x, of_student, student_label, rank,
                                                  done && group.member == 0);
    if (!p.grad_student || !done) return;
    tile.replace_student([&](T s, T t) {
      return head.counts ? gradient_of<kPasses>(c, x, p.with_ce, p.standardize, s, t) : T(0);
    });
    tile.set_student(label_slot, c.at_label);
  });
  if (p.grad_student && done) tile.store();
}

}  // namespace cuda
}  // namespace sortkd
