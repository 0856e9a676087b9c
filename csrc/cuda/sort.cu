// The corrected teacher alone: every value copied once, those of the classes above the label moved by one. A block a
// row.
#include "access.cuh"
#include "choices.h"
#include "host.h"
#include "order.cuh"

namespace sortkd {
namespace cuda {

// `p` with the teacher on both sides and the result in the gradient's place.
template <typename X>
__device__ __forceinline__ void corrected_row(const LossParams<Acc<X>>& p, Group& group, int64_t row) {
  using T = Acc<X>;
  constexpr int kWidth = Vector<X>::kWidth;
  const RowHead<T> head = read_head(p, row);
  const Peeled<X> access(p, head, group);
  int* const count = reinterpret_cast<int*>(group.shared + kGroupBytes);
  Entry<T>* const shared = reinterpret_cast<Entry<T>*>(group.shared + kGroupBytes + kCounterBytes);
  Entry<T>* const entries = reinterpret_cast<Entry<T>*>(p.entries + blockIdx.x * p.entry_bytes);
  const Entry<T>* ordered = entries;
  Entry<T> first = Entry<T>::last();
  const int edge = access.edge_class();
  T label_value = 0;
  Count broken{0};
  int n = 0;
  if (group.member == 0) *count = 0;
  __syncthreads();
  if (head.counts) {
    label_value = access.teacher_one(head.label);
    const auto look = [&](bool held, T t, int c) {
      broken.n += held && t != t;
      append(entries, count, held && p.correction != Correction::None && t > label_value, t, c);
    };
    for (int k = 0; k < access.steps; ++k) {
      const Vector<X> v = access.teacher_at(k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) look(access.holds(k, i), v.get(i), access.class_of(k, i));
    }
    if (access.edges > 0) look(edge != kNotHeld, edge != kNotHeld ? access.teacher_one(edge) : T(0), edge);
    broken = group.merged(broken);
    __syncthreads();
    n = broken.n ? 0 : *count;
  }
  if (n > 0 && p.correction == Correction::Sort) {
    ordered = put_in_order(entries, entries + p.C, shared, p.shared_entries, n);
    first = ordered[0];
  } else if (n > 0) {
    First<T> least{first};
    for (int i = group.member; i < n; i += group.size) least.merge({entries[i]});
    first = group.merged(least).entry;
  }
  // One NaN spoils the row, as it spoils the row's loss.
  const X nan = narrowed<X>(std::numeric_limits<T>::quiet_NaN());
  for (int k = 0; k < access.steps; ++k) {
    Vector<X> v = access.teacher_at(k);
    if (broken.n) v.fill(widened(nan));
    access.store_at(k, v);
  }
  if (edge != kNotHeld) access.grad[edge] = broken.n ? nan : access.teacher[edge];
  __syncthreads();
  if (n == 0) return;
  if (group.member == 0) access.store_one(head.label, first.value());
  if (p.correction == Correction::Swap) {
    if (group.member == 0) access.store_one(first.c(), label_value);
    return;
  }
  for (int i = group.member; i < n; i += group.size)
    access.store_one(ordered[i].c(), i + 1 < n ? ordered[i + 1].value() : label_value);
}

template <typename X>
__global__ void __launch_bounds__(most_stream_threads(sizeof(Acc<X>) == 8), 1)
    sort_kd_logits(const __grid_constant__ LossParams<Acc<X>> p) {
  Group group = Group::of(static_cast<int>(blockDim.x), 1);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    corrected_row<X>(p, group, row);
    __syncthreads();  // the next row takes this one's shared and scratch memory
  }
}

namespace {

template <typename X>
struct Plan {
  StreamChoice stream;
  char* entries;
  size_t bytes;
  Plan(const SortArgs& job, void* scratch) {
    stream = choose_stream(job.rows, job.C, Vector<X>::kWidth, job.correction != Correction::None,
                           sizeof(Entry<Acc<X>>), 0, processors());
    Pieces pieces{static_cast<char*>(scratch)};
    entries = pieces.take<char>(stream.blocks * stream.entry_bytes);
    bytes = pieces.used;
  }
};

template <typename X>
cudaError_t run(const SortArgs& job, void* scratch, cudaStream_t stream) {
  using T = Acc<X>;
  const Plan<X> plan(job, scratch);
  LossParams<T> p{};
  p.rows = job.rows;
  p.inner = 1;
  p.C = static_cast<int>(job.C);
  p.student = p.teacher = job.teacher;
  p.grad_student = job.corrected;
  p.target = job.target;
  p.ignore_index = job.ignore_index;
  p.correction = job.correction;
  p.entries = plan.entries;
  p.entry_bytes = plan.stream.entry_bytes;
  p.shared_entries = plan.stream.shared_entries;
  const size_t shared = kGroupBytes + kCounterBytes + plan.stream.shared_entries * sizeof(Entry<T>);
  if (job.rows) SORTKD_LAUNCH((sort_kd_logits<X>), plan.stream.blocks, plan.stream.threads, shared, stream, p);
  return cudaGetLastError();
}

template <typename F>
auto with_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::Float) return f(float{});
  if (dtype == Dtype::BFloat16) return f(BFloat16{});
  if (dtype == Dtype::Half) return f(Half{});
  return f(double{});
}

}  // namespace

size_t scratch_bytes(const SortArgs& job) {
  return with_dtype(job.dtype, [&](auto x) { return Plan<decltype(x)>(job, nullptr).bytes; });
}

int run_sort(const SortArgs& job, void* scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  return with_dtype(job.dtype, [&](auto x) { return run<decltype(x)>(job, scratch, stream); });
}

}  // namespace cuda
}  // namespace sortkd
