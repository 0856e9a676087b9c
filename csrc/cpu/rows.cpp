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
  int64_t padded, tile, max_breaks;
  std::unique_ptr<char[]> memory;
  T *student, *teacher;          // logits that are not in the caller's memory as they are needed
  T *exp_student, *exp_teacher;  // exponentials
  std::unique_ptr<int32_t[]> breaks;
  std::unique_ptr<uint8_t[]> seen;  // for `scatter`
  Above<T> above;

  // k: of a top-k teacher, else 0.
  Workspace(const Layout& layout, int64_t k) {
    constexpr int64_t kAlign = 64, kWidth = Vec<T>::size();
    padded = (layout.C + kWidth - 1) / kWidth * kWidth;
    const int64_t row_bytes = padded * static_cast<int64_t>(sizeof(T));
    tile = layout.inner > 1 ? kMaxTile : std::clamp<int64_t>(kTileBytes / (2 * row_bytes), 1, kMaxTile);
    memory.reset(new char[4 * tile * row_bytes + kAlign]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    T* next = reinterpret_cast<T*>((address + kAlign - 1) / kAlign * kAlign);
    for (T** rows : {&student, &teacher, &exp_student, &exp_teacher}) *rows = std::exchange(next, next + tile * padded);
    max_breaks = k + 8;  // the label's and the last vector, and a word of `scatter` beyond
    breaks.reset(new int32_t[tile * max_breaks]);
    if (k) seen.reset(new uint8_t[padded / kWidth + 8]);
  }
};

// A row between the stages.
template <typename T>
struct RowState {
  bool counts;
  Row<T> student, teacher;
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
  // The row is read, and its gradient written, where the caller has it.
  const bool direct_student = inner == 1 && args.student_dtype == c10::CppTypeToScalarType<T>::value;
  const bool direct_teacher =
      inner == 1 && args.teacher_dtype == c10::CppTypeToScalarType<T>::value && !args.teacher_indices;

  // The temperature's gradient is a covariance, which wants small terms.
  const bool centred = args.grad_temperature;

  void run(int64_t begin, int64_t end) const {
    Workspace<T> work(args.layout, args.k);
    RowState<T> rows[kMaxTile];
    for (int64_t n = begin; n < end;) {
      const int64_t in_block = inner == 1 ? end - n : std::min(end - n, inner - n % inner);
      const int64_t count = std::min(work.tile, in_block);
      load(n, count, work);
      for (int64_t r = 0; r < count; ++r) prepare(n + r, r, rows[r], work);
      for (int64_t r = 0; r < count; ++r)
        if (rows[r].counts) sum(rows[r], ahead(n + r, count, r, work));
      for (int64_t r = 0; r < count; ++r) finish(n + r, rows[r], gradient_place(n + r, r, work));
      if (args.grad_student && !direct_student) store(n, count, work);
      n += count;
    }
  }

  int64_t offset(int64_t n) const { return inner == 1 ? n * C : n / inner * C * inner + n % inner; }

  void sum(RowState<T>& row, const Ahead& ahead) const {
    row.sums = row.teacher.sparse
                   ? row_sums<T, plain, moments, true>(row.student, row.teacher, row.scale, ahead, centred)
                   : row_sums<T, plain, moments, false>(row.student, row.teacher, row.scale, ahead, centred);
  }

  // While row n is computed, in place r of a tile of `count`. Where there is nothing to fetch the addresses stay on one cached
  // line; past the end of the logits they do no harm.
  Ahead ahead(int64_t n, int64_t count, int64_t r, const Workspace<T>& work) const {
    const char* nothing = reinterpret_cast<const char*>(work.exp_student + r * work.padded);
    Ahead ahead{nothing, nothing, 0, 0, nothing, 0};
    if (inner == 1) {
      const int64_t next = is_longer<T>(C, kLongRowBytes) ? n * C + kAhead : (n + count) * C;
      ahead.student = element(args.student, args.student_dtype, next);
      ahead.student_bytes = c10::elementSize(args.student_dtype);
      if (!args.teacher_indices) {
        ahead.teacher = element(args.teacher, args.teacher_dtype, next);
        ahead.teacher_bytes = c10::elementSize(args.teacher_dtype);
      }
    }
    if (args.grad_student && inner == 1 && !is_longer<T>(C, kHugeRowBytes)) {
      ahead.grad = element(args.grad_student, args.student_dtype, n * C);
      ahead.grad_bytes = c10::elementSize(args.student_dtype);
    }
    return ahead;
  }

  T* gradient_place(int64_t n, int64_t r, const Workspace<T>& work) const {
    if (!args.grad_student) return nullptr;
    return direct_student ? static_cast<T*>(args.grad_student) + n * C : work.student + r * work.padded;
  }

  void load(int64_t n, int64_t count, const Workspace<T>& work) const {
    if (!direct_student) with_dtype(args.student_dtype, [&](auto tag) {
      const auto* x = static_cast<const decltype(tag)*>(args.student) + offset(n);
      load_tile(x, C, inner, count, work.student, work.padded);
    });
    if (!direct_teacher && !args.teacher_indices) with_dtype(args.teacher_dtype, [&](auto tag) {
      const auto* x = static_cast<const decltype(tag)*>(args.teacher) + offset(n);
      load_tile(x, C, inner, count, work.teacher, work.padded);
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
    const int64_t at = r * work.padded;
    const T* student = direct_student ? static_cast<const T*>(args.student) + n * C : work.student + at;
    const T* teacher = direct_teacher ? static_cast<const T*>(args.teacher) + n * C : work.teacher + at;
    int32_t* breaks = work.breaks.get() + r * work.max_breaks;
    row.teacher = {teacher, work.exp_teacher + at, C, label, T(0), T(0), {breaks, 0}, false, T(0)};
    if (args.teacher_indices)
      read_top_k(n, row.teacher, work.teacher + at, breaks, work.seen.get());
    else
      row.teacher.breaks.count = ordinary_breaks<T>(C, label, breaks);
    row.teacher.label_value = teacher[label];
    row.temperature = static_cast<const T*>(args.temperature)[n * args.temperature_stride];
    T inverse_teacher = row.inverse = T(1) / row.temperature;
    if (options.standardize) {
      const auto [of_student, of_teacher] = moments_of(student, teacher, C);
      row.of_student = of_student;
      row.inverse /= of_student.std + T(kStandardizeEps);
      inverse_teacher /= of_teacher.std + T(kStandardizeEps);
    }
    row.student = {student, work.exp_student + at, C, label, student[label], T(0), row.teacher.breaks, false, T(0)};
    const int64_t rank = rank_of(row.teacher);
    if (args.rank) args.rank[n] = static_cast<int32_t>(rank);
    correct(row.teacher, work.teacher + at, work.above, options.correction, rank);
    const T log2e = static_cast<T>(kLog2e);
    row.scale = {row.inverse * log2e, inverse_teacher * log2e, T(1) / row.inverse};
  }

  // Sparse, unless the tail is above the label's logit (or is NaN): then the correction moves absent classes too.
  void read_top_k(int64_t n, Row<T>& row, T* scratch, int32_t* breaks, uint8_t* seen) const {
    with_dtype(args.teacher_dtype, [&](auto tag) {
      const int64_t k = args.k, *indices = args.teacher_indices + n * k;
      const auto* values = static_cast<const decltype(tag)*>(args.teacher) + n * k;
      row.tail = tail_of<decltype(tag), T>(values, k, C, options.uniform_tail);
      row.breaks.count = scatter(values, indices, k, C, row.label, row.tail, scratch, seen, breaks);
      row.sparse = row.tail <= scratch[row.label] && !options.standardize;
      if (row.sparse) return;
      densify(values, indices, k, C, row.tail, scratch);
      row.breaks.count = ordinary_breaks<T>(C, row.label, breaks);
    });
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
    // One class beside the label is no distribution to match: without this, NCKD would be the rounding of 0.
    const T beta = C > 2 ? static_cast<T>(options.beta) : T(0);
    const RowTerms<T> terms = row_terms(row.sums, row.temperature, options.decoupled, T(options.alpha), beta,
                                        plain != Plain::None, moments);
    *kd = terms.kd;
    if (ce) *ce = terms.ce;
    const T upstream = static_cast<const T*>(args.upstream)[n * args.upstream_stride];
    if (grad_temperature) *grad_temperature = upstream * T(options.kd_weight) * terms.grad_temperature;
    if (!grad) return;
    const Coefficients<T> c = coefficients(row, terms, upstream);
    if (row.teacher.sparse)
      write_gradient<T, plain, moments, true>(row.student, row.teacher, row.scale, c, grad);
    else
      write_gradient<T, plain, moments, false>(row.student, row.teacher, row.scale, c, grad);
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
    if (options.standardize && row.of_student.std > T(0)) {
      const T deviation = row.of_student.std + T(kStandardizeEps);
      const T along = kd_scale * terms.along_u / (row.inverse * T(C - 1) * row.of_student.std);
      c.along = along * static_cast<T>(kLn2) / (row.inverse * deviation);  // v counts in bits of u, z in deviations
      c.v_mean = Exponent<T, moments>{row.student.reference, row.scale.student}(row.of_student.mean);
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
  Workspace<T> work(args.layout, 0);
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
      Row<T> row{work.teacher, nullptr, C, label, work.teacher[label], T(0), {nullptr, 0}, false, T(0)};
      correct(row, work.teacher, work.above, args.correction, rank_of(row));
      if (has_nan(work.teacher, C)) std::fill(work.teacher, work.teacher + C, std::numeric_limits<T>::quiet_NaN());
      store_row(work.teacher, C, out);
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
