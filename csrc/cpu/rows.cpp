// The row loop of each op. This file is compiled once for each instruction set and arithmetic type (setup.py), so it and what
// it includes hold no function that another file could link against: everything lives in the namespace CPU_CAPABILITY.
#include <cmath>
#include <memory>

#include "row_io.h"
#include "row_loss.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

using c10::ScalarType;

template <typename F>
inline void with_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    case ScalarType::Half: return f(c10::Half{});
    default: return f(double{});
  }
}

inline const char* element(const void* base, ScalarType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * static_cast<int64_t>(c10::elementSize(dtype));
}

// Rows are worked on a tile at a time, stage by stage: a row of a hundred classes waits longer for its own logarithms than it
// computes, and its neighbours fill the wait. A tile stays within half of the smallest L1; with classes `inner` apart it is
// one cache line of rows.
constexpr int64_t kMaxTile = 16;
constexpr int64_t kTileBytes = 16 << 10;

template <typename T>
struct Workspace {
  int64_t padded, tile;
  std::unique_ptr<char[]> memory;
  T *student, *teacher, *v;
  Above<T> above;

  Workspace(const Layout& layout, bool with_v) {
    constexpr int64_t kAlign = 64;
    padded = (layout.C + Vec<T>::size() - 1) / Vec<T>::size() * Vec<T>::size();
    const int64_t row_bytes = padded * static_cast<int64_t>(sizeof(T));
    tile = layout.inner > 1 ? kMaxTile : std::clamp<int64_t>(kTileBytes / (2 * row_bytes), 1, kMaxTile);
    memory.reset(new char[(with_v ? 3 : 2) * tile * row_bytes + kAlign]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    student = reinterpret_cast<T*>((address + kAlign - 1) / kAlign * kAlign);
    teacher = student + tile * padded;
    v = teacher + tile * padded;
  }
};

// Take the label out, pad, and find the largest of the others.
template <typename T>
inline Row<T> make_row(T* values, int64_t C, int64_t padded, int64_t label) {
  const T lowest = -std::numeric_limits<T>::infinity();
  Row<T> row{values, C, padded, label, values[label], lowest};
  std::fill(values + C, values + padded, lowest);
  values[label] = lowest;
  return row;
}

// f(i) for each vector of a row, two at a time where it is long: `f` gets an accumulator's number beside the offset, so that
// one addition need not wait for the last.
template <typename T, typename F>
inline void for_vectors(int64_t padded, F&& f) {
  constexpr int64_t kWidth = Vec<T>::size();
  int64_t i = 0;
  for (; i + 2 * kWidth <= padded; i += 2 * kWidth) {
    f(i, 0);
    f(i + kWidth, 1);
  }
  if (i < padded) f(i, 0);
}

// The largest of the others in both rows, and how many of the teacher's are above the label.
template <typename T>
inline int64_t find_maxima_and_rank(Row<T>& student, Row<T>& teacher) {
  using V = Vec<T>;
  V largest_s[2] = {V(student.max_others), V(student.max_others)};
  V largest_t[2] = {V(teacher.max_others), V(teacher.max_others)};
  V count[2] = {V(T(0)), V(T(0))};
  const V threshold(teacher.label_value), one(T(1));
  for_vectors<T>(teacher.padded, [&](int64_t i, int k) {
    const V t = V::loadu(teacher.values + i);
    largest_s[k] = at::vec::clamp_min(V::loadu(student.values + i), largest_s[k]);
    largest_t[k] = at::vec::clamp_min(t, largest_t[k]);
    count[k] = count[k] + ((t > threshold) & one);
  });
  student.max_others = max_of(at::vec::clamp_min(largest_s[0], largest_s[1]));
  teacher.max_others = max_of(at::vec::clamp_min(largest_t[0], largest_t[1]));
  return static_cast<int64_t>(sum_of(count[0] + count[1]));
}

template <typename T>
inline bool has_nan(const T* values, int64_t count) {
  using V = Vec<T>;
  V seen(T(0));
  for (int64_t i = 0; i < count; i += V::size()) seen = seen + (V::loadu(values + i).isnan() & V(T(1)));
  return sum_of(seen) > T(0);
}

template <typename T>
struct Moments {
  T mean, std;
};

// Mean and unbiased standard deviation of whole rows, label included, two rows at once. The values are taken relative to the
// row's first, so that a constant row has a standard deviation of exactly 0. The padding is set to that value meanwhile.
template <typename T>
inline std::pair<Moments<T>, Moments<T>> moments_of(T* a, T* b, int64_t C, int64_t padded) {
  using V = Vec<T>;
  const T n = static_cast<T>(C), filled = static_cast<T>(padded - C);
  std::fill(a + C, a + padded, a[0]);
  std::fill(b + C, b + padded, b[0]);
  const V shift_a(a[0]), shift_b(b[0]);
  V sum_a[2] = {V(T(0)), V(T(0))}, sum_b[2] = {V(T(0)), V(T(0))};
  for_vectors<T>(padded, [&](int64_t i, int k) {
    sum_a[k] = sum_a[k] + (V::loadu(a + i) - shift_a);
    sum_b[k] = sum_b[k] + (V::loadu(b + i) - shift_b);
  });
  const T offset_a = sum_of(sum_a[0] + sum_a[1]) / n, offset_b = sum_of(sum_b[0] + sum_b[1]) / n;
  const V centre_a(offset_a), centre_b(offset_b);
  V squares_a[2] = {V(T(0)), V(T(0))}, squares_b[2] = {V(T(0)), V(T(0))};
  for_vectors<T>(padded, [&](int64_t i, int k) {
    const V d_a = V::loadu(a + i) - shift_a - centre_a, d_b = V::loadu(b + i) - shift_b - centre_b;
    squares_a[k] = at::vec::fmadd(d_a, d_a, squares_a[k]);
    squares_b[k] = at::vec::fmadd(d_b, d_b, squares_b[k]);
  });
  const auto deviation = [&](const V* squares, T offset) {
    const T total = sum_of(squares[0] + squares[1]) - filled * offset * offset;
    return C > 1 && total > T(0) ? std::sqrt(total / (n - T(1))) : total - total;  // 0, or NaN for a row with one
  };
  return {{a[0] + offset_a, deviation(squares_a, offset_a)}, {b[0] + offset_b, deviation(squares_b, offset_b)}};
}

// A row between the stages.
template <typename T>
struct RowState {
  bool counts;
  Row<T> student, teacher;
  T* v;
  T temperature, inverse;  // inverse: d u / d s without the way through the deviation
  Moments<T> of_student;
  Exponents<T> scale;
  RowSums<T> sums;
};

template <typename T, Plain plain, bool moments>
struct LossRows {
  const LossArgs& args;
  const LossOptions& options = args.options;
  const int64_t C = args.layout.C;
  const int64_t inner = args.layout.inner;
  // The gradient can be written straight to its place.
  const bool direct = inner == 1 && args.student_dtype == c10::CppTypeToScalarType<T>::value;

  void run(int64_t begin, int64_t end) const {
    Workspace<T> work(args.layout, keeps_v<T, plain, moments>);
    RowState<T> rows[kMaxTile];
    for (int64_t n = begin; n < end;) {
      const int64_t in_block = inner == 1 ? end - n : std::min(end - n, inner - n % inner);
      const int64_t count = std::min(work.tile, in_block);
      load(n, count, work);
      for (int64_t r = 0; r < count; ++r) prepare(n + r, r, rows[r], work);
      for (int64_t r = 0; r < count; ++r)
        if (rows[r].counts)
          rows[r].sums = exponentiate<T, plain, moments>(rows[r].student, rows[r].teacher, rows[r].v, rows[r].scale,
                                                         next_row(n + r + count, end));
      for (int64_t r = 0; r < count; ++r) finish(n + r, rows[r], gradient_place(n + r, r, work));
      if (args.grad_student && !direct) store(n, count, work);
      n += count;
    }
  }

  int64_t offset(int64_t n) const { return inner == 1 ? n * C : n / inner * C * inner + n % inner; }

  NextRow next_row(int64_t n, int64_t end) const {
    if (n >= end || inner != 1 || args.teacher_indices) return {};
    return {element(args.student, args.student_dtype, n * C), element(args.teacher, args.teacher_dtype, n * C),
            static_cast<int64_t>(c10::elementSize(args.student_dtype)),
            static_cast<int64_t>(c10::elementSize(args.teacher_dtype))};
  }

  T* gradient_place(int64_t n, int64_t r, const Workspace<T>& work) const {
    if (!args.grad_student) return nullptr;
    return direct ? static_cast<T*>(args.grad_student) + n * C : work.student + r * work.padded;
  }

  void load(int64_t n, int64_t count, const Workspace<T>& work) const {
    with_dtype(args.student_dtype, [&](auto tag) {
      const auto* x = static_cast<const decltype(tag)*>(args.student) + offset(n);
      load_tile(x, C, inner, count, work.student, work.padded);
    });
    with_dtype(args.teacher_dtype, [&](auto tag) {
      const auto* x = static_cast<const decltype(tag)*>(args.teacher);
      if (!args.teacher_indices) return load_tile(x + offset(n), C, inner, count, work.teacher, work.padded);
      for (int64_t i = n; i < n + count; ++i)
        load_top_k(x + i * args.k, args.teacher_indices + i * args.k, args.k, C, options.uniform_tail,
                   work.teacher + (i - n) * work.padded);
    });
  }

  void store(int64_t n, int64_t count, const Workspace<T>& work) const {
    with_dtype(args.student_dtype, [&](auto tag) {
      auto* x = static_cast<decltype(tag)*>(args.grad_student) + offset(n);
      store_tile(work.student, work.padded, C, inner, count, x);
    });
  }

  void prepare(int64_t n, int64_t r, RowState<T>& row, Workspace<T>& work) const {
    const int64_t label = args.target[n];
    row.counts = label != args.ignore_index;
    if (!row.counts) return;
    T* student = work.student + r * work.padded;
    T* teacher = work.teacher + r * work.padded;
    row.v = work.v + r * work.padded;
    row.temperature = static_cast<const T*>(args.temperature)[n * args.temperature_stride];
    T inverse_teacher = row.inverse = T(1) / row.temperature;
    if (options.standardize) {
      const auto [of_student, of_teacher] = moments_of(student, teacher, C, work.padded);
      row.of_student = of_student;
      row.inverse /= of_student.std + T(kStandardizeEps);
      inverse_teacher /= of_teacher.std + T(kStandardizeEps);
    }
    row.student = make_row(student, C, work.padded, label);
    row.teacher = make_row(teacher, C, work.padded, label);
    const int64_t rank = find_maxima_and_rank(row.student, row.teacher);
    if (args.rank) args.rank[n] = static_cast<int32_t>(rank);
    correct(row.teacher, work.above, options.correction, rank);
    const T log2e = static_cast<T>(kLog2e);
    row.scale = {row.inverse * log2e, inverse_teacher * log2e, T(1) / row.inverse};
  }

  void finish(int64_t n, const RowState<T>& row, T* grad) const {
    T* kd = static_cast<T*>(args.kd) + n;
    T* ce = args.ce ? static_cast<T*>(args.ce) + n : nullptr;
    T* grad_temperature = args.grad_temperature ? static_cast<T*>(args.grad_temperature) + n : nullptr;
    if (!row.counts) {
      *kd = T(0);
      if (ce) *ce = T(0);
      if (args.rank) args.rank[n] = 0;
      if (grad_temperature) *grad_temperature = T(0);
      if (grad) std::fill(grad, grad + C, T(0));
      return;
    }
    const RowTerms<T> terms = row_terms(row.sums, row.temperature, options.decoupled, T(options.alpha), T(options.beta),
                                        plain != Plain::None, moments);
    *kd = terms.kd;
    if (ce) *ce = terms.ce;
    const T upstream = static_cast<const T*>(args.upstream)[n * args.upstream_stride];
    if (grad_temperature) *grad_temperature = upstream * T(options.kd_weight) * terms.grad_temperature;
    if (grad) write_gradient<T, plain, moments>(row.student, row.teacher, row.v, coefficients(row, terms, upstream), grad);
  }

  // d loss / d s = (T^2 dF/du) (du/ds), and under standardization the way through the student's deviation.
  Coefficients<T> coefficients(const RowState<T>& row, const RowTerms<T>& terms, T upstream) const {
    const T kd_scale = upstream * T(options.kd_weight) * row.temperature * row.temperature * row.inverse;
    const T ce_scale = upstream * T(options.ce_weight);
    Coefficients<T> c{};
    c.on_student = kd_scale * terms.on_student;
    c.on_teacher = kd_scale * terms.on_teacher;
    c.on_plain = ce_scale * terms.on_plain;
    c.at_label = kd_scale * terms.at_label + ce_scale * terms.plain_at_label;
    c.plain = row.scale.plain;
    if (options.standardize && row.of_student.std > T(0)) {
      const T deviation = row.of_student.std + T(kStandardizeEps);
      const T max_s = std::isfinite(row.student.max_others) ? row.student.max_others : T(0);
      const T along = kd_scale * terms.along_u / (row.inverse * T(C - 1) * row.of_student.std);
      c.along = along * static_cast<T>(kLn2) / (row.inverse * deviation);  // v counts in bits of u, z in deviations
      c.v_mean = (row.of_student.mean - max_s) * row.scale.student;
      c.at_label -= along * (row.student.label_value - row.of_student.mean) / deviation;
    }
    return c;
  }
};

template <typename T>
inline void choose_loss_rows(const LossArgs& args, int64_t begin, int64_t end) {
  const LossOptions& options = args.options;
  const auto run = [&](auto rows) { rows.run(begin, end); };
  if (options.standardize || args.grad_temperature)
    return options.want_ce ? run(LossRows<T, Plain::Own, true>{args}) : run(LossRows<T, Plain::None, true>{args});
  if (!options.want_ce) return run(LossRows<T, Plain::None, false>{args});
  // Row temperatures differ: no one power fits them.
  const T temperature = args.temperature_stride ? T(0) : *static_cast<const T*>(args.temperature);
  if (temperature == T(1)) return run(LossRows<T, Plain::Power1, false>{args});
  if (temperature == T(2)) return run(LossRows<T, Plain::Power2, false>{args});
  if (temperature == T(4)) return run(LossRows<T, Plain::Power4, false>{args});
  run(LossRows<T, Plain::Own, false>{args});
}

template <typename T>
inline void sort_rows(const SortArgs& args, int64_t begin, int64_t end) {
  const int64_t C = args.layout.C;
  Workspace<T> work(args.layout, false);
  with_dtype(args.dtype, [&](auto tag) {
    using X = decltype(tag);
    for (int64_t n = begin; n < end; ++n) {
      const X* x = static_cast<const X*>(args.teacher) + n * C;
      X* out = static_cast<X*>(args.corrected) + n * C;
      const int64_t label = args.target[n];
      if (label == args.ignore_index) {
        std::memcpy(out, x, C * sizeof(X));
        continue;
      }
      load_row(x, C, work.teacher);
      Row<T> row = make_row(work.teacher, C, work.padded, label);
      Row<T> same = row;
      const int64_t rank = find_maxima_and_rank(same, row);
      correct(row, work.above, args.correction, rank);
      row.values[label] = row.label_value;
      if (has_nan(row.values, work.padded)) std::fill(row.values, row.values + C, std::numeric_limits<T>::quiet_NaN());
      store_row(row.values, C, out);
    }
  });
}

// The overloads that dispatch.cpp chooses from.
void loss_rows(const LossArgs& args, int64_t begin, int64_t end, SORTKD_ACC) { 
  choose_loss_rows<SORTKD_ACC>(args, begin, end);
}
void corrected_rows(const SortArgs& args, int64_t begin, int64_t end, SORTKD_ACC) {
  sort_rows<SORTKD_ACC>(args, begin, end);
}

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
