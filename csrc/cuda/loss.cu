// The launches of a loss: [count the labels,] the rows, [the rows whose list did not fit].
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <tuple>

#include "launch.cuh"
#include "reduce.cuh"

namespace sortkd {
namespace cuda {

// counts[b]: the rows of block b's span that count.
__global__ void __launch_bounds__(kCountThreads)
    sort_kd_count(const int64_t* target, int64_t rows, int64_t ignore_index, unsigned* counts) {
  wait_for_launch_before();
  allow_next_launch();  // what is before this one has ended, too
  const int64_t span = (rows + gridDim.x - 1) / gridDim.x, end = min(rows, (blockIdx.x + 1) * span);
  int n = 0;
#pragma unroll 8
  for (int64_t row = blockIdx.x * span + threadIdx.x; row < end; row += kCountThreads) n += target[row] != ignore_index;
  n = warp_sum(n);
  int* const warps = reinterpret_cast<int*>(shared_memory());
  if (lane_id() == 0) warps[threadIdx.x / kWarp] = n;
  __syncthreads();
  if (threadIdx.x != 0) return;
  n = 0;
  for (int w = 0; w < kCountThreads / static_cast<int>(kWarp); ++w) n += warps[w];
  counts[blockIdx.x] = static_cast<unsigned>(n);
}

const Device& device() {
  constexpr int kDevices = 64;
  static std::once_flag asked[kDevices];
  static Device devices[kDevices];
  int current = 0;
  cudaGetDevice(&current);
  Device& d = devices[current % kDevices];
  const auto ask = [&] {
    cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, current);
    cudaDeviceGetAttribute(&d.cache_bytes, cudaDevAttrL2CacheSize, current);
    cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current);
    d.cluster = most_cluster(d);
#if defined(__CUDACC__)
    // Code of sm_90 has it, as clusters; graphs know it since CUDA 12.3.
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
    d.overlaps = d.cluster > 1 && std::min(driver, runtime) >= 12030;
#endif
  };
#if defined(__CUDACC__)
  std::call_once(asked[current % kDevices], ask);
#else
  ask();  // tests change the device
#endif
  return d;
}

cudaError_t grant_most(const void* kernel, const Device& device) {
  // Once a kernel and device.
  static std::mutex mutex;
  static std::set<std::tuple<const void*, int, int>> granted;
  int current = 0;
  cudaGetDevice(&current);
  const std::lock_guard lock(mutex);
  if (granted.contains({kernel, current, device.shared_bytes})) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  if (error == cudaSuccess && device.cluster == kMostCluster)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) granted.emplace(kernel, current, device.shared_bytes);
  return error;
}

namespace {

// Pieces of one allocation, each aligned to 256 bytes.
struct Pieces {
  char* base;
  size_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* const piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
};

// Bytes from a multiple of those of a vector.
int past_vector(const void* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16); }

// 16-byte accesses to the rows of both sides, wherever they begin. Rows and vectors have indices of 32 bits.
bool has_vectors(const LossArgs& args) {
  const int64_t bytes = args.layout.rows() * args.layout.C * bytes_of(args.student_dtype);
  return args.layout.inner == 1 && bytes < int64_t{16} << 32 && args.layout.rows() < 1 << 30 && !args.teacher_indices &&
         args.student_dtype == args.teacher_dtype && !args.acc_double() &&
         past_vector(args.student) == past_vector(args.teacher);
}

// Whole vectors (access.cuh) of rows that has_vectors() does not take.
bool has_whole_vectors(const LossArgs& args) {
  const int bytes = bytes_of(args.student_dtype), bytes_t = bytes_of(args.teacher_dtype);
  const int W = args.teacher_indices ? 16 / bytes : 4;
  const bool two_dtypes = bytes != bytes_t;  // one of floats
  return args.layout.inner == 1 && !args.acc_double() && args.layout.C % W == 0 && (args.teacher_indices || two_dtypes) &&
         reinterpret_cast<uintptr_t>(args.student) % (W * bytes) == 0 &&
         reinterpret_cast<uintptr_t>(args.grad_student) % (W * bytes) == 0 &&
         (args.teacher_indices || reinterpret_cast<uintptr_t>(args.teacher) % (W * bytes_t) == 0);
}

Mode mode_of(const LossArgs& args) {
  const LossConfig& config = args.config;
  if (config.standardize || args.temperature || args.grad_temperature) return Mode::General;
  const double T = config.temperature;
  if (T == 1 || !config.with_ce()) return Mode::Kd;
  return T == 2 || T == 4 ? Mode::KdCe : Mode::KdCeAny;
}

// Gives shared memory its parts, behind what reductions take. `width`: classes of a vector where rows come through it.
template <typename T>
Launch place_lists(const Shape& shape, Mode mode, int width, int blocks, int room, char* in_device, Lists lists, Params<T>& p) {
  const int threads = shape.threads;
  int bytes = partial_bytes(shape.kind, shape.threads, shape.cluster, value_bytes(shape.kind, mode));
  const auto take = [&](int count) {
    const int place = bytes;
    bytes += (count + 15) / 16 * 16;
    return place;
  };
  p.list.room = room;
  p.list.in_device = in_device;
  p.stage = take(width ? threads / 32 * stage_bytes(shape.kind, shape.held, width) : 0);
  p.list.counts = take(shape.rows * static_cast<int>(sizeof(int)));
  p.list.notes = take(kNoteBytes);
  const bool lanes = shape.kind == Kind::Lanes;
  const int near_entries = lanes ? threads * kNearEntries : kNearOfBlock + threads / 32 * kNearOfWarp;
  p.list.near = take(width ? near_entries * kNearBytes : 0);
  p.list.entries = take(in_device || width ? 0 : shape.rows * p.list.room * static_cast<int>(sizeof(Entry<T>)));
  const bool by_value = lists == Lists::ByValue;
  p.list.histogram = take(by_value ? kTableBytes : in_device ? histogram_bytes(shape.threads) : 0);
  p.merging = take(static_cast<int>(sizeof(int)) * (threads / 32 + 1));
  p.totals = take(shape.rows * static_cast<int>(sizeof(Totals)));
  const bool gathers = width && p.grad_temperature;  // rows whose temperature's gradient is pending: as held.cuh has them
  p.pending = take(gathers ? (shape.kind == Kind::Lanes ? threads : 32) * kPendingBytes : 0);
  p.list.present = take(p.teacher_indices ? (p.C + 31) / 32 * 4 : 0);
  if (in_device) {
    const int entry_bytes = by_value ? kPlaceBytes : 2 * static_cast<int>(sizeof(Entry<T>));
    p.list.long_room = choose_long_room(room, bytes, entry_bytes, device());
    p.list.entries = take(p.list.long_room * entry_bytes);
  }
  return {blocks, shape.threads, shape.cluster, bytes, device().overlaps};
}

// How a call is launched, and its scratch memory. Made twice, for the size and for the launches.
template <typename T>
struct Plan {
  Mode mode;
  Lists rest_lists;
  bool vectors, aligned, overflows;
  Shape shape, rest;
  int counters, blocks, rest_blocks, long_blocks, room;
  unsigned* counts;
  unsigned long long* ticket;
  Totals* partials;
  int32_t* overflow;
  char *entries, *rest_entries;
  float* moved;
  size_t bytes;

  Plan(const LossArgs& args, void* scratch) {
    const Device& d = device();
    const int64_t rows = args.layout.rows(), C = args.layout.C;
    const int bytes_s = bytes_of(args.student_dtype), bytes_t = bytes_of(args.teacher_dtype);
    mode = mode_of(args);
    vectors = has_vectors(args);
    aligned = vectors && reinterpret_cast<uintptr_t>(args.student) % 16 == 0 && C * bytes_s % 16 == 0;
    const bool lists = args.config.correction != Correction::None || args.rank;
    const int64_t most_listed = args.teacher_indices ? args.k + 1 : lists ? std::max<int64_t>(C - 1, 1) : 1;
    const auto hold = [&](int width, bool every_aligned, Mode as) {
      const int64_t row = vectors_of(C, width, every_aligned);
      shape = choose_vectors(rows, row, width, as, d);
      if (shape.held == 0) return;
      Params<T> p{args};
      p.grad_temperature = static_cast<T*>(args.grad_temperature);
      const int list = static_cast<int>(std::min<int64_t>(most_listed, kListRoom));
      shape.bytes = place_lists(shape, mode, vectors ? width : 0, 0, list, nullptr, Lists::Short, p).shared_bytes;
      if (shape.bytes > d.shared_bytes) shape = read_twice(row, most_threads(Kind::Block, as));
    };
    if (vectors) hold(16 / bytes_s, aligned, mode);
    if (mode == Mode::KdCeAny && !(vectors && shape.held > 0)) {
      mode = Mode::General;  // rows that are read twice, or have two dtypes, take any temperature as all else
      if (vectors) hold(16 / bytes_s, aligned, mode);
    }
    if (!vectors && args.layout.inner > 1 && args.layout.inner < 1 << 30 && C <= kMostColumnClasses && !args.teacher_indices &&
        !args.acc_double()) {
      shape = choose_columns(C);
      if (args.student_dtype != args.teacher_dtype) mode = Mode::General;
    } else if (!vectors) {
      if (!has_whole_vectors(args)) mode = Mode::General;
      shape = choose_mixed(C);
      // Rows of two dtypes that the lanes of a warp can hold.
      if (mode != Mode::General && !args.teacher_indices) hold(4, true, Mode::General);
      if (shape.held == 0 || shape.kind == Kind::Block) shape = choose_mixed(C);
    }
    rest_lists = lists_of_rest(vectors, bytes_t);
    const bool by_value = rest_lists == Lists::ByValue;
    // Of a block, of its lists or table of values in device memory, and of the logits that have moved.
    const int64_t list_bytes = by_value ? kPlaceBytes * std::min<int64_t>(most_listed, kHalves)
                                        : 2 * most_listed * static_cast<int64_t>(sizeof(Entry<T>));
    const int64_t moved_bytes = by_value ? 0 : C * static_cast<int64_t>(sizeof(float));
    const auto blocks_in = [](int64_t bytes, int64_t each, int most) {
      return static_cast<int>(std::clamp<int64_t>(bytes / each, 1, most));
    };
    blocks = choose_blocks(shape, vectors ? mode : Mode::General, rows, C * (bytes_s + bytes_t), d);
    // Of clusters those that are there at once, which leave processors out: others would begin when all rows are done.
    if (shape.cluster > 1 && !overrides.blocks) blocks = std::min(blocks, shape.cluster * resident_clusters(shape, mode));
    room = static_cast<int>(most_listed);
    // A held row's list has no room for some lists of fewer entries, those of one warp.
    const bool held = staged_width(args) > 0;
    const int64_t most_room = overrides.list_room ? overrides.list_room : held ? kNearOfBlock : kListRoom;
    const int64_t sure_room = held ? std::min<int64_t>(most_room, kNearOfWarp) : most_room;
    bool in_device = false;
    overflows = false;
    rest_blocks = long_blocks = 0;
    if (shape.kind == Kind::Block && most_listed > sure_room) {
      if (args.teacher_indices || args.acc_double()) {
        in_device = true;
        mode = Mode::General;  // whose lists may lie there
        blocks = blocks_in(kListBytes, list_bytes, blocks);
      } else {
        overflows = true;
        room = static_cast<int>(most_room);
        rest = by_value ? choose_by_value(C) : choose_mixed(C);
        rest_blocks = std::min(choose_blocks(rest, Mode::General, rows, C * (bytes_s + bytes_t), d), d.processors);
        // How many values a row has is not known before it is read: each block has device memory for them.
        rest_blocks =
            by_value ? blocks_in(kListBytes, list_bytes, rest_blocks) : blocks_in(kListBytes / 2, moved_bytes, rest_blocks);
        long_blocks = by_value ? rest_blocks : blocks_in(kListBytes - rest_blocks * moved_bytes, list_bytes, rest_blocks);
        if (overrides.long_room && !by_value) long_blocks = 1;
      }
    }

    Pieces pieces{static_cast<char*>(scratch)};
    const bool mean = args.config.reduction == Reduction::Mean;
    counters = mean && rows > kCountedByBlocks ? std::min(kMostCounters, ceil_div(rows, kRowsACounter)) : 0;
    counts = pieces.take<unsigned>(counters);
    ticket = pieces.take<unsigned long long>(2);
    partials = pieces.take<Totals>(blocks / shape.cluster + rest_blocks);
    overflow = pieces.take<int32_t>(overflows ? rows : 0);
    entries = pieces.take<char>(in_device ? blocks * list_bytes : 0);
    rest_entries = pieces.take<char>(long_blocks * list_bytes);
    moved = pieces.take<float>(overflows && !by_value ? rest_blocks * C : 0);
    if (!in_device) entries = nullptr;
    if (!overflows) overflow = nullptr;
    bytes = pieces.used;
  }

  // Classes of a vector of rows that held.cuh takes, else 0.
  int staged_width(const LossArgs& args) const { return vectors && shape.held > 0 ? 16 / bytes_of(args.student_dtype) : 0; }

  Params<T> params(const LossArgs& args) const {
    const LossConfig& config = args.config;
    const int64_t C = args.layout.C;
    Params<T> p{args};
    p.rows = args.layout.rows();
    p.inner = args.layout.inner;
    p.C = static_cast<int>(C);
    p.k = static_cast<int>(args.k);
    p.grad = args.grad_student;
    p.inplace = args.grad_student == args.student;
    const bool apart = vectors && past_vector(args.grad_student) != past_vector(args.student);
    p.scalar_grads = apart && args.grad_student ? p.C : 0;
    p.aligned = aligned;
    p.shift = static_cast<unsigned>(reinterpret_cast<uintptr_t>(args.student) % 16 / bytes_of(args.student_dtype));
    p.ignored = config.ignore_index >= 0 && config.ignore_index < C ? static_cast<int>(config.ignore_index) : -1;
    p.temperature = static_cast<const T*>(args.temperature);
    p.temperature_stride = static_cast<int>(args.temperature_stride);
    p.temperature_value = static_cast<T>(config.temperature);
    p.inverse_temperature = static_cast<T>(1 / config.temperature);
    p.grad_output = static_cast<const T*>(args.grad_output);
    p.grad_output_stride = static_cast<int>(args.grad_output_stride);
    p.grad_temperature = static_cast<T*>(args.grad_temperature);
    p.over_label = config.correction != Correction::None || args.rank ? T(0) : std::numeric_limits<T>::infinity();
    p.decoupled = config.decoupled();
    p.with_ce = config.with_ce();
    p.moments = config.standardize || args.grad_temperature;
    p.power = mode != Mode::General && config.with_ce() ? static_cast<T>(config.temperature) : T(0);
    p.kd_weight = static_cast<T>(config.kd_weight);
    p.ce_weight = static_cast<T>(config.ce_weight);
    p.alpha = static_cast<T>(config.alpha);
    p.beta = static_cast<T>(config.beta_of(C));
    p.reduced = config.reduction != Reduction::None;
    p.mean = config.reduction == Reduction::Mean;
    p.loss = static_cast<T*>(args.loss);
    p.kd = static_cast<T*>(args.kd);
    p.ce = static_cast<T*>(args.ce);
    p.counts = counters ? counts : nullptr;
    p.count_blocks = counters;
    p.partials = partials;
    p.partials_all = blocks / shape.cluster;
    return p;
  }
};

// Different for every call of a process, and unlike what memory holds.
unsigned long long fresh_nonce() {
  static std::atomic<unsigned long long> next{
      static_cast<unsigned long long>(std::chrono::steady_clock::now().time_since_epoch().count() * 0x9e3779b97f4a7c15ull)};
  return (next.fetch_add(1) & ((1ull << (64 - kTicketBits)) - 1)) | 1ull << (63 - kTicketBits);
}

template <typename T>
cudaError_t launch(const Plan<T>& plan, const LossArgs& args, const Shape& shape, Mode mode, const Launch& launch,
                   const Params<T>& p, cudaStream_t stream) {
  assert(launch.threads <= (p.long_blocks && plan.rest_lists == Lists::ByValue ? kTableBlock : most_threads(shape.kind, mode)));
  if constexpr (std::is_same_v<T, float>) {
    if (plan.vectors) {
      Params<T> q = p;
      const unsigned bytes = p.shift * static_cast<unsigned>(bytes_of(args.student_dtype));
      q.student = static_cast<const char*>(p.student) - bytes;
      q.teacher = static_cast<const char*>(p.teacher) - bytes;
      if (p.grad) q.grad = static_cast<char*>(p.grad) - bytes;
      if (args.student_dtype == Dtype::Float) return launch_rows<float>(shape, mode, launch, q, stream);
      if (args.student_dtype == Dtype::BFloat16) return launch_rows<BFloat16>(shape, mode, launch, q, stream);
      return launch_rows<Half>(shape, mode, launch, q, stream);
    }
  }
  return launch_mixed<T>(shape, mode, launch, p, stream);
}

template <typename T>
cudaError_t run(const LossArgs& args, void* scratch, cudaStream_t stream) {
  const Plan<T> plan(args, scratch);
  Params<T> p = plan.params(args);
  if (p.rows == 0 && !p.reduced) return cudaSuccess;
  if (plan.counters) {
    const Launch on_labels{plan.counters, kCountThreads, 1, kCountThreads / 32 * static_cast<int>(sizeof(int)),
                           device().overlaps};
    const cudaError_t error = launch_kernel("sort_kd_count", sort_kd_count, on_labels, stream, args.target, p.rows,
                                            p.config.ignore_index, plan.counts);
    if (error != cudaSuccess) return error;
  }
  const Shape& shape = plan.shape;
  p.nonce = fresh_nonce();
  p.ticket = p.reduced ? plan.ticket : nullptr;
  p.overflowed = plan.ticket + 1;
  p.cluster = shape.cluster;
  while (1 << p.log_lanes < shape.lanes) ++p.log_lanes;
  p.groups = plan.blocks / shape.cluster;
  p.step = p.groups * shape.rows;
  p.tiles = (p.rows + shape.rows - 1) / shape.rows;
  p.overflow = plan.overflow;
  const Launch on_rows =
      place_lists(shape, plan.mode, plan.staged_width(args), plan.blocks, plan.room, plan.entries, Lists::Short, p);
  const cudaError_t error = launch(plan, args, shape, plan.mode, on_rows, p, stream);
  if (error != cudaSuccess || !plan.overflows) return error;
  p.partials_before = p.groups;
  p.partials_all += plan.rest_blocks;
  p.cluster = 1;
  p.groups = plan.rest_blocks;
  p.long_blocks = plan.long_blocks;
  p.list.moved = plan.moved;
  p.power = 0;
  const int room = static_cast<int>(std::max<int64_t>(args.layout.C - 1, 1));
  const Launch on_rest =
      place_lists(plan.rest, Mode::General, 0, plan.rest_blocks, room, plan.rest_entries, plan.rest_lists, p);
  return launch(plan, args, plan.rest, Mode::General, on_rest, p, stream);
}

}  // namespace

size_t scratch_bytes(const LossArgs& args) {
  if (args.config.tail == Tail::Bucket) return bucket_scratch_bytes(args);
  return args.acc_double() ? Plan<double>(args, nullptr).bytes : Plan<float>(args, nullptr).bytes;
}

int run_loss(const LossArgs& args, void* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.config.tail == Tail::Bucket) return run_bucket(args, scratch, on);
  return args.acc_double() ? run<double>(args, scratch, on) : run<float>(args, scratch, on);
}

}  // namespace cuda
}  // namespace sortkd
