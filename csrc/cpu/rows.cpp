// The row loop of each op. This file is compiled once for each instruction set and arithmetic type (setup.py), so it and what
// it includes hold no function that another file could link against: everything lives in the namespace CPU_CAPABILITY.
#include "rows.h"

#include <cmath>
#include <memory>

#include "bucket.h"
#include "row_io.h"
#include "row_loss.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

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
template <typename T, bool moments>
struct RowState {
  bool counts;
  Row<T> student, teacher;
  T temperature, inverse;  // inverse: d v / d s without the way through the standard deviation
  MeanStd<T> of_student;
  Exponents<T> scale;
  RowSums<SumType<T, moments>> sums;
  RowLogs<SumType<T, moments>> logs;
};

template <typename T, CeExp ce_exp, bool moments>
struct LossRows {
  const RowLoop& loop;
  const LossArgs& args = loop.args;
  const LossConfig& config = args.config;
  const int64_t C = args.layout.C;
  const int64_t inner = args.layout.inner;
  // The row is read, and its gradient written, where the caller has it.
  const bool direct_student = inner == 1 && args.student_dtype == kDtype<T>;
  const bool direct_teacher = inner == 1 && args.teacher_dtype == kDtype<T> && !args.teacher_indices;

  // The temperature's gradient is a covariance, which wants small terms.
  const bool centred = args.grad_temperature;

  void run(int64_t begin, int64_t end) const {
    Workspace<T> work(args.layout, args.k);
    RowState<T, moments> rows[kMaxTile];
    for (int64_t n = begin; n < end;) {
      const int64_t in_block = inner == 1 ? end - n : std::min(end - n, inner - n % inner);
      const int64_t count = std::min(work.tile, in_block);
      load(n, count, work);
      for (int64_t r = 0; r < count; ++r) prepare(n + r, r, rows[r], work);
      for (int64_t r = 0; r < count; ++r)
        if (rows[r].counts) sum(rows[r], ahead(n + r, count, r, work));
      take_logs(rows, count, work.tile);
      for (int64_t r = 0; r < count; ++r) finish(n + r, rows[r], gradient_place(n + r, r, work));
      if (args.grad_student && !direct_student) store(n, count, work);
      n += count;
    }
  }

  int64_t offset(int64_t n) const { return inner == 1 ? n * C : n / inner * C * inner + n % inner; }

  void sum(RowState<T, moments>& row, const Ahead& ahead) const {
    row.sums = row.teacher.sparse ? row_sums<T, ce_exp, moments, true>(row.student, row.teacher, row.scale, ahead, centred)
                                  : row_sums<T, ce_exp, moments, false>(row.student, row.teacher, row.scale, ahead, centred);
  }

  void take_logs(RowState<T, moments>* rows, int64_t count, int64_t tile) const {
    constexpr bool with_ce = ce_exp != CeExp::None;
    // A vector's logarithms take as long as those of four numbers. By the tile's size and not by how many rows there are: a
    // row's last bits must not depend on its neighbours. Double sums beside float rows have no vector.
    if constexpr (!moments)
      if (tile >= 4) return tile_logs<T>(rows, count, with_ce);
    for (int64_t r = 0; r < count; ++r) rows[r].logs = row_logs(rows[r].sums, with_ce);
  }

  // While row n is computed, in place r of a tile of `count`. Where there is nothing to fetch the addresses stay on one cached
  // line; past the end of the logits they do no harm.
  Ahead ahead(int64_t n, int64_t count, int64_t r, const Workspace<T>& work) const {
    const char* nothing = reinterpret_cast<const char*>(work.exp_student + r * work.padded);
    Ahead ahead{nothing, nothing, 0, 0, nothing, 0};
    if (inner == 1) {
      const int64_t next = is_longer<T>(C, kLongRowBytes) ? n * C + kAhead : (n + count) * C;
      ahead.student = element(args.student, args.student_dtype, next);
      ahead.student_bytes = bytes_of(args.student_dtype);
      if (!args.teacher_indices) {
        ahead.teacher = element(args.teacher, args.teacher_dtype, next);
        ahead.teacher_bytes = bytes_of(args.teacher_dtype);
      }
    }
    if (args.grad_student && inner == 1 && !is_longer<T>(C, kHugeRowBytes)) {
      ahead.grad = element(args.grad_student, args.student_dtype, n * C);
      ahead.grad_bytes = bytes_of(args.student_dtype);
    }
    return ahead;
  }

  T* gradient_place(int64_t n, int64_t r, const Workspace<T>& work) const {
    if (!args.grad_student) return nullptr;
    return direct_student ? static_cast<T*>(args.grad_student) + n * C : work.student + r * work.padded;
  }

  void load(int64_t n, int64_t count, const Workspace<T>& work) const {
    if (!direct_student)
      with_dtype(args.student_dtype, [&](auto tag) {
        const auto* x = static_cast<const decltype(tag)*>(args.student) + offset(n);
        load_tile(x, C, inner, count, work.student, work.padded);
      });
    if (!direct_teacher && !args.teacher_indices)
      with_dtype(args.teacher_dtype, [&](auto tag) {
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

  void prepare(int64_t n, int64_t r, RowState<T, moments>& row, Workspace<T>& work) const {
    const int64_t label = args.target[n];
    row.counts = label != config.ignore_index;
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
    row.temperature = args.temperature ? static_cast<const T*>(args.temperature)[n * args.temperature_stride]
                                       : static_cast<T>(config.temperature);
    T inverse_teacher = row.inverse = T(1) / row.temperature;
    row.of_student = {};
    if (config.standardize) {
      const auto [of_student, of_teacher] = mean_std_of(student, teacher, C);
      row.of_student = of_student;
      row.inverse /= of_student.std + T(kStandardizeEps);
      inverse_teacher /= of_teacher.std + T(kStandardizeEps);
    }
    row.student = {student, work.exp_student + at, C, label, student[label], T(0), row.teacher.breaks, false, T(0)};
    const int64_t rank = rank_of(row.teacher);
    if (args.rank) args.rank[n] = static_cast<int32_t>(rank);
    correct(row.teacher, work.teacher + at, work.above, config.correction, rank);
    const T log2e = static_cast<T>(kLog2e);
    row.scale = {row.inverse * log2e, inverse_teacher * log2e, T(1) / row.inverse};
  }

  // Sparse, unless the tail is above the label's logit (or is NaN): then the correction moves absent classes too.
  void read_top_k(int64_t n, Row<T>& row, T* scratch, int32_t* breaks, uint8_t* seen) const {
    with_dtype(args.teacher_dtype, [&](auto tag) {
      const int64_t k = args.k;
      const ClassIndices indices = ClassIndices{args.teacher_indices, args.int64_indices}.from(n * k);
      const auto* values = static_cast<const decltype(tag)*>(args.teacher) + n * k;
      row.tail = tail_of<decltype(tag), T>(values, indices, k, C, row.label, config.tail == Tail::Uniform);
      row.breaks.count = scatter(values, indices, k, C, row.label, row.tail, scratch, seen, breaks);
      row.sparse = row.tail <= scratch[row.label] && !config.standardize;
      if (row.sparse) return;
      densify(values, indices, k, C, row.tail, scratch);
      row.breaks.count = ordinary_breaks<T>(C, row.label, breaks);
    });
  }

  void finish(int64_t n, const RowState<T, moments>& row, T* grad) const {
    T* kd = static_cast<T*>(loop.kd) + n;
    T* ce = loop.ce ? static_cast<T*>(loop.ce) + n : nullptr;
    T* grad_temperature = args.grad_temperature ? static_cast<T*>(args.grad_temperature) + n : nullptr;
    if (!row.counts) {
      *kd = T(0);
      if (ce) *ce = T(0);
      if (args.rank) args.rank[n] = 0;
      if (grad_temperature) *grad_temperature = T(0);
      if (grad) std::fill(grad, grad + C, T(0));
      return;
    }
    using A = SumType<T, moments>;
    const RowTerms<A> terms = row_terms<A>(row.sums, row.logs, row.temperature, config.decoupled(), A(config.alpha),
                                           A(config.beta_of(C)), ce_exp != CeExp::None, moments);
    *kd = static_cast<T>(terms.kd);
    if (ce) *ce = static_cast<T>(terms.ce);
    const A grad_output =
        loop.mean_scale * (args.grad_output ? A(static_cast<const T*>(args.grad_output)[n * args.grad_output_stride]) : A(1));
    if (grad_temperature) *grad_temperature = static_cast<T>(grad_output * A(config.kd_weight) * terms.grad_temperature);
    if (!grad) return;
    const MeanStd<A> of_student{row.of_student.mean, row.of_student.std};
    const Coefficients<A> wide = gradient_coefficients<A>(terms, config, grad_output, row.temperature, row.inverse, A(C),
                                                          row.student.label_value, of_student);
    const Coefficients<T> c{T(wide.on_student), T(wide.on_teacher), T(wide.on_ce), T(wide.at_label), T(wide.dstd)};
    if (row.teacher.sparse)
      write_gradient<T, ce_exp, moments, true>(row.student, row.teacher, row.scale, c, row.of_student.mean, grad);
    else
      write_gradient<T, ce_exp, moments, false>(row.student, row.teacher, row.scale, c, row.of_student.mean, grad);
  }
};

template <typename T>
inline void sort_rows(const SortArgs& args, int64_t begin, int64_t end) {
  const int64_t C = args.C;
  Workspace<T> work({args.rows, C, 1}, 0);
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

// The overloads that launcher.cpp chooses from.
void loss_rows(const RowLoop& loop, int64_t begin, int64_t end, SORTKD_ACC) {
  using T = SORTKD_ACC;
  const LossConfig& config = loop.args.config;
  const auto run = [&](auto rows) { rows.run(begin, end); };
  if (config.tail == Tail::Bucket) return run(BucketRows<T>{loop});
  if (config.standardize || loop.args.grad_temperature)
    return config.with_ce() ? run(LossRows<T, CeExp::Own, true>{loop}) : run(LossRows<T, CeExp::None, true>{loop});
  if (!config.with_ce()) return run(LossRows<T, CeExp::None, false>{loop});
  // Row temperatures differ: no one power fits them.
  double temperature = config.temperature;
  if (loop.args.temperature) temperature = loop.args.temperature_stride ? 0 : *static_cast<const T*>(loop.args.temperature);
  if (temperature == 1) return run(LossRows<T, CeExp::Power1, false>{loop});
  if (temperature == 2) return run(LossRows<T, CeExp::Power2, false>{loop});
  if (temperature == 4) return run(LossRows<T, CeExp::Power4, false>{loop});
  run(LossRows<T, CeExp::Own, false>{loop});
}
void corrected_rows(const SortArgs& args, int64_t begin, int64_t end, SORTKD_ACC) { sort_rows<SORTKD_ACC>(args, begin, end); }

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
