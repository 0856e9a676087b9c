// Tail::Bucket: a block a row, which it reads from memory twice. What is computed, and why: ../cpu/bucket.h.
#include "launch.cuh"

namespace sortkd {
namespace cuda {

template <typename T>
struct BucketParams {
  LossArgs args;
  T* small;  // [blocks, k + 2]
  int present;
};

template <typename T>
SORTKD_DEVICE T exp_of(T x) {
  return power_of_two(x * static_cast<T>(kLog2e));
}

// sum exp(x) as exp(top) * sum.
template <typename T>
struct LogSum {
  T top, sum;
  static SORTKD_DEVICE LogSum none() { return {-kInfinity<T>, T(0)}; }
  SORTKD_DEVICE void add(T x) {
    if (x != -kInfinity<T>) merge({x, T(1)});
  }
  SORTKD_DEVICE void merge(const LogSum& other) {
    if (other.sum == T(0)) return;
    if (other.top > top) {
      sum = sum * exp_of(top - other.top) + other.sum;
      top = other.top;
    } else {
      sum += other.sum * exp_of(other.top - top);
    }
  }
  SORTKD_DEVICE LogSum shuffled_xor(int offset) const {
    return {__shfl_xor_sync(kFullMask, top, offset), __shfl_xor_sync(kFullMask, sum, offset)};
  }
  SORTKD_DEVICE T log() const { return sum == T(0) ? -kInfinity<T> : top + std::log(sum); }
};

// Of a row, for all of its block.
template <typename T>
struct BucketNotes {
  T on_student, on_teacher, at_label, on_ce;
};

// T: float, for a student of dtype kStudent; or double, for any.
template <typename T, Dtype kStudent>
__global__ void __launch_bounds__(kMostGeneralBlock, 1) sort_kd_bucket(const __grid_constant__ BucketParams<T> p) {
  const LossArgs& args = p.args;
  const Dtype dtype = std::is_same_v<T, double> ? args.student_dtype : kStudent;
  const LossConfig& config = args.config;
  const int C = static_cast<int>(args.layout.C), k = static_cast<int>(args.k), width = k + 2;
  const int64_t inner = args.layout.inner, rows = args.layout.outer * inner;
  Group<Kind::Block> group(0, 1);
  const int member = group.member, size = group.size;
  unsigned* const present = reinterpret_cast<unsigned*>(shared_memory() + p.present);
  BucketNotes<T>& notes = *reinterpret_cast<BucketNotes<T>*>(present + (C + 31) / 32 + (C + 31) / 32 % 2);
  T* const small = p.small + static_cast<int64_t>(blockIdx.x) * width;
  // f(c, x) for the thread's classes.
  const auto each = [&](auto&& at, auto&& f) {
    for (int first = member; first < C; first += kClassesAhead * size) {
      T x[kClassesAhead];
#pragma unroll
      for (int j = 0; j < kClassesAhead; ++j) x[j] = at(min(first + j * size, C - 1));
#pragma unroll
      for (int j = 0; j < kClassesAhead; ++j)
        if (first + j * size < C) f(first + j * size, x[j]);
    }
  };
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t label = args.target[row];
    const bool counts = label != config.ignore_index;
    assert((!counts || (label >= 0 && label < C)) && "a label is outside [0, C)");
    const int64_t begin = row / inner * C * inner + row % inner;
    const auto at = [&](int c) { return element<T>(args.student, dtype, begin + c * inner); };
    const auto set = [&](int64_t c, T g) { set_element(args.grad_student, dtype, begin + c * inner, g); };
    if (member == 0 && args.rank) args.rank[row] = 0;  // the teacher's side, which is not here, knows it
    if (!counts) {
      for (int c = member; args.grad_student && c < C; c += size) set(c, T(0));
      if (member == 0) {
        static_cast<T*>(args.loss)[row] = T(0);
        if (args.kd) static_cast<T*>(args.kd)[row] = static_cast<T*>(args.ce)[row] = T(0);
        if (args.grad_temperature) static_cast<T*>(args.grad_temperature)[row] = T(0);
      }
      continue;
    }
    const ClassIndices indices = ClassIndices{args.teacher_indices, args.int64_indices}.from(row * k);
    const auto teacher = [&](int j) { return element<T>(args.teacher, args.teacher_dtype, row * width + j); };
    for (int w = member; w < (C + 31) / 32; w += size) present[w] = 0;
    __syncthreads();
    Largest<int> found{};  // k - j of the label's first entry j
    for (int j = member; j < k; j += size) {
      const int64_t c = indices[j];
      assert(c >= 0 && c < C && "a teacher index is outside [0, C)");
      atomicOr(present + c / 32, 1u << (c % 32));
      small[j] = at(static_cast<int>(c));
      if (c == label) found.student = max(found.student, k - j);
    }
    if (member == 0) atomicOr(present + label / 32, 1u << (label % 32));
    int place = k - group.merged(found).student;  // of the label among the k + 2
    const T of_label = at(static_cast<int>(label));

    // The classes outside; then also the k; the label apart.
    __syncthreads();
    LogSum<T> rest = LogSum<T>::none();
    each(at, [&](int c, T x) {
      if (!(present[c / 32] >> (c % 32) & 1)) rest.add(x);
    });
    rest = group.merged(rest);
    const T reference = rest.sum == T(0) ? T(0) : rest.top;
    LogSum<T> others = member == 0 ? rest : LogSum<T>::none();
    for (int j = member; j < k; j += size) {
      if (indices[j] != label)
        others.add(small[j]);
      else if (j != place)
        small[j] = -kInfinity<T>;
    }
    const T log_others = group.merged(others).log();
    const bool outside = place == k, apart = outside && config.correction != Correction::None;
    if (outside && !apart) rest.add(of_label), place = k + 1;
    const T log_bucket = rest.log();
    if (member == 0) small[k] = apart ? of_label : -kInfinity<T>, small[k + 1] = log_bucket;
    __syncthreads();

    // KD of the k + 2.
    T temperature = static_cast<T>(config.temperature);
    if (args.temperature) temperature = static_cast<const T*>(args.temperature)[row * args.temperature_stride];
    const T inverse = T(1) / temperature;
    Largest<T> largest = Largest<T>::none();
    for (int j = member; j < width; j += size)
      if (j != place) largest.student = max(largest.student, small[j]), largest.add(teacher(j));
    largest = group.merged(largest);
    const T top_s = largest.student == -kInfinity<T> ? T(0) : largest.student;
    const T top_t = largest.teacher == -kInfinity<T> ? T(0) : largest.teacher;
    Sums<double, 6> sums{};
    for (int j = member; j < width; j += size) {
      if (j == place) continue;
      const T u = (small[j] - top_s) * inverse, v = (teacher(j) - top_t) * inverse, e_s = exp_of(u), e_t = exp_of(v);
      sums.of[0] += e_s, sums.of[1] += e_t;
      if (e_s != T(0)) sums.of[3] += e_s * u;
      if (e_t == T(0)) continue;
      sums.of[2] += e_t * (v - u), sums.of[4] += e_t * v, sums.of[5] += e_t * v * (v - u);
    }
    sums = group.merged(sums);
    if (member == 0) {
      const auto finish = [&](auto zero) {
        using S = decltype(zero);
        RowSums<S> of{};
        of.z_student = sums.of[0], of.z_teacher = sums.of[1], of.cross = sums.of[2];
        of.moment_student = sums.of[3], of.moment_teacher = sums.of[4], of.moment_cross = sums.of[5];
        of.v_label_student = (small[place] - top_s) * inverse, of.v_label_teacher = (teacher(place) - top_t) * inverse;
        const RowTerms<S> terms =
            row_terms<S>(of, row_logs(of, false), temperature, false, S(1), S(0), false, args.grad_temperature != nullptr);
        S grad_output = S(1);
        if (args.grad_output) grad_output = static_cast<const T*>(args.grad_output)[row * args.grad_output_stride];
        const Coefficients<S> c =
            gradient_coefficients<S>(terms, config, grad_output, temperature, inverse, S(width), S(0), MeanStd<S>{});
        const Binary<T> q = from_log_odds<ScalarMath<T>>(of_label - log_others);
        const T ce = of_label == kInfinity<T> ? of_label - of_label : -q.log_label, kd = terms.kd;
        notes = {T(c.on_student), T(c.on_teacher), T(c.at_label), T(0)};
        T loss = static_cast<T>(config.kd_weight) * kd;
        if (config.ce_weight != 0) {
          loss += static_cast<T>(config.ce_weight) * ce;
          notes.on_ce = static_cast<T>(grad_output * config.ce_weight) * q.others;
        }
        static_cast<T*>(args.loss)[row] = loss;
        if (args.kd) static_cast<T*>(args.kd)[row] = kd, static_cast<T*>(args.ce)[row] = ce;
        if (args.grad_temperature)
          static_cast<T*>(args.grad_temperature)[row] = grad_output * config.kd_weight * terms.grad_temperature;
      };
      args.grad_temperature ? finish(0.0) : finish(T(0));
    }
    __syncthreads();
    if (!args.grad_student) continue;

    const auto of_kd = [&](int j) {
      if (j == place) return notes.at_label;
      return notes.on_student * exp_of((small[j] - top_s) * inverse) -
             notes.on_teacher * exp_of((teacher(j) - top_t) * inverse);
    };
    const auto ratio = [&](T a, T b) { return b == -kInfinity<T> ? T(0) : exp_of(a - b); };
    const T of_bucket = of_kd(k + 1), on_ce = notes.on_ce;
    const T factor = of_bucket * ratio(reference, log_bucket) + on_ce * ratio(reference, log_others);
    each(at, [&](int c, T x) { set(c, exp_of(x - reference) * factor); });
    __syncthreads();
    // The k and the label over it.
    for (int j = member; j < k; j += size)
      if (indices[j] != label) set(indices[j], of_kd(j) + (on_ce == T(0) ? T(0) : on_ce * ratio(small[j], log_others)));
    if (member == 0) set(label, (outside && !apart ? of_bucket * ratio(of_label, log_bucket) : of_kd(place)) - on_ce);
    __syncthreads();
  }
}

namespace {

Shape shape_of(const LossArgs& args) { return choose_mixed(args.layout.C); }
int blocks_of(const LossArgs& args) {
  return choose_blocks(shape_of(args), Mode::General, args.layout.rows(), 2 * args.layout.C * bytes_of(args.student_dtype),
                       device());
}

template <typename T, Dtype kStudent>
cudaError_t launch_bucket(const LossArgs& args, void* scratch, cudaStream_t stream) {
  const int threads = shape_of(args).threads;
  BucketParams<T> p{args, static_cast<T*>(scratch), partial_bytes(Kind::Block, threads, 1)};
  const int words = ceil_div(args.layout.C, 32);
  const int bytes = p.present + (words + words % 2) * 4 + static_cast<int>(sizeof(BucketNotes<T>));
  return launch_kernel("sort_kd_bucket", sort_kd_bucket<T, kStudent>, {blocks_of(args), threads, 1, bytes, false}, stream, p);
}

}  // namespace

size_t bucket_scratch_bytes(const LossArgs& args) {
  return static_cast<size_t>(blocks_of(args)) * (args.k + 2) * (args.acc_double() ? sizeof(double) : sizeof(float));
}

cudaError_t run_bucket(const LossArgs& args, void* scratch, cudaStream_t stream) {
  if (args.layout.rows() == 0) return cudaSuccess;
  if (args.acc_double()) return launch_bucket<double, Dtype::Double>(args, scratch, stream);
  if (args.student_dtype == Dtype::Float) return launch_bucket<float, Dtype::Float>(args, scratch, stream);
  if (args.student_dtype == Dtype::Half) return launch_bucket<float, Dtype::Half>(args, scratch, stream);
  return launch_bucket<float, Dtype::BFloat16>(args, scratch, stream);
}

}  // namespace cuda
}  // namespace sortkd
