// The corrected teacher alone, and a gradient times what came from above: each value is copied once.
#include "launch.cuh"
#include "list.cuh"

namespace sortkd {
namespace cuda {

struct SortParams {
  SortArgs args;
  ListPlaces list;
  int32_t* overflow;  // the entries of a row that has no room for them, else 0
};

// A block a row. The class's values first as they are, then those of the list over them.
template <typename X>
SORTKD_DEVICE void corrected_row(const SortParams& p, Group<Kind::Block>& group, int64_t row) {
  using T = Acc<X>;
  const int C = static_cast<int>(p.args.C);
  const X* const from = static_cast<const X*>(p.args.teacher) + row * C;
  X* const to = static_cast<X*>(p.args.corrected) + row * C;
  List<T, Kind::Block, true> list(p.list, group, p.list.in_device ? p.overflow[row] : 0);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t label = p.args.target[row];
  const bool counts = label != p.args.ignore_index;
  assert((!counts || (label >= 0 && label < C)) && "a label is outside [0, C)");
  const T label_value = counts ? widened(from[label]) : T(0);
  list.clear();
  __syncthreads();
  const bool moves = counts && p.args.correction != Correction::None;
  if (moves && list.own) list.collect(group, C, label_value, [&](int c) { return widened(from[c]); });
  bool broken = false;
  for (int c = thread; c < C; c += threads) {
    const X x = from[c];
    const T value = widened(x);
    broken |= value != value;
    if (moves && !list.own && value > label_value) list.append(value, c);
    to[c] = x;
  }
  // One NaN spoils the row, as it spoils the row's loss.
  broken = __syncthreads_or(broken && counts);
  const int n = *list.count();
  if (!p.list.in_device && p.overflow && thread == 0) p.overflow[row] = n > p.list.room ? n : 0;
  if (broken) {
    for (int c = thread; c < C; c += threads) to[c] = narrowed<X>(std::numeric_limits<float>::quiet_NaN());
    return;
  }
  if (n == 0 || n > p.list.room) return;
  list.put_in_order(n, list.own);
  __syncthreads();
  if (thread == 0) to[label] = narrowed<X>(list[0].value());
  if (p.args.correction == Correction::Swap) {
    if (thread == 0) to[list[0].c()] = narrowed<X>(label_value);
    return;
  }
  for (int at = thread; at < n; at += threads) to[list[at].c()] = narrowed<X>(at + 1 < n ? list[at + 1].value() : label_value);
}

template <typename X>
__global__ void __launch_bounds__(kSortThreads, sizeof(X) == 8 ? 1 : 2) sort_kd_logits(const __grid_constant__ SortParams p) {
  Group<Kind::Block> group(0, 1);
  for (int64_t row = blockIdx.x; row < p.args.rows; row += gridDim.x) {
    if (p.list.in_device && !p.overflow[row]) continue;
    corrected_row<X>(p, group, row);
    __syncthreads();  // the next row takes this one's list
  }
}

// One number for all values, or one for each row of [outer, C, inner]; `span` = C * inner. The host need not know
// whether the one number is 1, as in a plain loss.backward(): in place, that costs a launch and no traffic.
template <typename X>
__global__ void __launch_bounds__(kScaleThreads) sort_kd_scale(const X* grad, X* scaled, const Acc<X>* grad_output, bool one,
                                                               int64_t total, int64_t span, int64_t inner, bool vectors) {
  using T = Acc<X>;
  constexpr int W = kWidth<X>;
  allow_next_launch();
  wait_for_launch_before();
  if (one && grad == scaled && *grad_output == T(1)) return;
  const auto number = [&](int64_t i) { return one ? *grad_output : grad_output[i / span * inner + i % inner]; };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, whole = vectors ? total / W : 0;
  const auto scale_vector = [&](int64_t v, const uint4& raw, int64_t next, T now, T then) {
    T values[W];
    unpack<X>(raw, values);
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] *= v * W + i < next ? now : then;
    reinterpret_cast<uint4*>(scaled)[v] = pack<X>(values);
  };
  const auto vector = [&](int64_t v) { return __ldcs(reinterpret_cast<const uint4*>(grad) + v); };
  if (one) {
    const T by = *grad_output;
#pragma unroll 1
    for (int64_t some = first; some < whole; some += kScaleAhead * step) {
      uint4 raw[kScaleAhead];
#pragma unroll
      for (int k = 0; k < kScaleAhead; ++k) raw[k] = vector(min(some + k * step, whole - 1));
#pragma unroll
      for (int k = 0; k < kScaleAhead; ++k)
        if (some + k * step < whole) scale_vector(some + k * step, raw[k], total, by, by);
    }
  } else {
    for (int64_t v = first; v < whole; v += step) {
      // Within a row of neighbouring classes the number changes at most once.
      const int64_t begin = v * W, next = (begin / span + 1) * span;
      const T now = number(begin);
      scale_vector(v, vector(v), next, now, next < begin + W ? number(next) : now);
    }
  }
  for (int64_t i = whole * W + first; i < total; i += step) scaled[i] = narrowed<X>(widened(grad[i]) * number(i));
}

namespace {

int threads_of(int64_t C) {
  return overrides.threads ? overrides.threads : std::clamp(power_of_two_over(ceil_div(C, 8)), 64, kSortThreads);
}

template <typename X>
struct SortPlan {
  int room, blocks, overflow_blocks;
  int64_t list_bytes;
  int32_t* overflow = nullptr;
  char* entries = nullptr;
  size_t bytes = 0;
  SortPlan(const SortArgs& args, void* scratch) {
    const int64_t most = std::max<int64_t>(args.C - 1, 1), most_room = overrides.list_room ? overrides.list_room : kListRoom;
    room = static_cast<int>(std::min(most, most_room));
    blocks = static_cast<int>(
        std::clamp<int64_t>(overrides.blocks ? overrides.blocks : device().processors * kProcessorThreads / threads_of(args.C),
                            1, std::max<int64_t>(args.rows, 1)));
    list_bytes = 2 * most * static_cast<int64_t>(sizeof(Entry<Acc<X>>));
    overflow_blocks = 0;
    if (most <= room || args.correction == Correction::None) return;
    overflow_blocks = static_cast<int>(std::clamp<int64_t>(kListBytes / list_bytes, 1, blocks));
    overflow = static_cast<int32_t*>(scratch);
    bytes = (args.rows * sizeof(int32_t) + 255) / 256 * 256;
    entries = static_cast<char*>(scratch) + bytes;
    bytes += overflow_blocks * list_bytes;
  }
};

template <typename X>
cudaError_t sort(const SortArgs& args, void* scratch, cudaStream_t stream) {
  const SortPlan<X> plan(args, scratch);
  if (args.rows == 0) return cudaSuccess;
  const int threads = threads_of(args.C);
  constexpr int kEntryBytes = static_cast<int>(sizeof(Entry<Acc<X>>));
  SortParams p{args, {.entries = 16, .histogram = 16, .room = plan.room}, plan.overflow};
  const auto launch = [&](int blocks, int shared_bytes) {
    return launch_kernel("sort_kd_logits", sort_kd_logits<X>, {blocks, threads, 1, shared_bytes, false}, stream, p);
  };
  const cudaError_t error = launch(plan.blocks, 16 + plan.room * kEntryBytes);
  if (error != cudaSuccess || !plan.overflow_blocks) return error;
  p.list.in_device = plan.entries;
  p.list.room = static_cast<int>(args.C - 1);
  p.list.entries = 16 + histogram_bytes(threads);
  p.list.long_room = choose_long_room(p.list.room, p.list.entries, 2 * kEntryBytes, device());
  return launch(plan.overflow_blocks, p.list.entries + 2 * p.list.long_room * kEntryBytes);
}

template <typename X>
cudaError_t scale(const ScaleArgs& args, cudaStream_t stream) {
  const int64_t span = args.layout.C * args.layout.inner, total = args.layout.outer * span;
  if (total == 0) return cudaSuccess;
  const bool one = args.grad_output_stride == 0;
  const auto past = (reinterpret_cast<uintptr_t>(args.grad) | reinterpret_cast<uintptr_t>(args.scaled)) % 16;
  // Two rows at most in a vector, and neighbouring classes in it.
  const bool vectors = past == 0 && (one || (args.layout.inner == 1 && span >= kWidth<X>));
  const int64_t needed = (total + kScaleThreads * kWidth<X> - 1) / (kScaleThreads * kWidth<X>);
  const auto blocks = std::min<int64_t>(needed, overrides.blocks ? overrides.blocks : device().processors * kScaleBlocks);
  return launch_kernel("sort_kd_scale", sort_kd_scale<X>, {static_cast<int>(blocks), kScaleThreads, 1, 0, device().overlaps},
                       stream, static_cast<const X*>(args.grad), static_cast<X*>(args.scaled),
                       static_cast<const Acc<X>*>(args.grad_output), one, total, span, args.layout.inner, vectors);
}

}  // namespace

size_t scratch_bytes(const SortArgs& args) {
  return with_dtype(args.dtype, [&](auto x) { return SortPlan<decltype(x)>(args, nullptr).bytes; });
}

int run_sort(const SortArgs& args, void* scratch, void* stream) {
  return with_dtype(args.dtype, [&](auto x) { return sort<decltype(x)>(args, scratch, static_cast<cudaStream_t>(stream)); });
}

int run_scale(const ScaleArgs& args, void* stream) {
  return with_dtype(args.dtype, [&](auto x) { return scale<decltype(x)>(args, static_cast<cudaStream_t>(stream)); });
}

}  // namespace cuda
}  // namespace sortkd
