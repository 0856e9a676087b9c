// What the row kernels are launched with, and their launchers by the source that they are compiled in.
#pragma once

#include "choices.h"
#include "elements.cuh"
#include "list.cuh"

namespace sortkd {
namespace cuda {

// Which classes a row's list has: those above its label, in shared memory (of doubles also in device memory); the same of
// rows that have too many for that, the only ones of a launch of their own, in either; of such rows of halves none, for
// which there is a table of their values; or the k of a top-k teacher, too.
enum class Lists { Short, Long, ByValue, TopK };

// Of that launch: where the rows have vectors, of logits of so many bytes.
constexpr Lists lists_of_rest(bool vectors, int bytes) { return vectors && bytes == 2 ? Lists::ByValue : Lists::Long; }

// A block's sums over the rows that it works on in turn, in shared memory, as registers are short; and in device memory.
struct Totals {
  double kd, ce;
};

template <typename T>
struct Params : LossInputs {
  int64_t rows, inner;
  int C;
  int k;
  void* grad;
  bool inplace;          // over the student's logits
  int scalar_grads;      // C where it begins elsewhere between multiples of 16 bytes than the rows do, else 0
  bool aligned;          // whether each row begins and ends at such a multiple
  unsigned shift;        // classes from one to the first row
  int ignored;           // the class that is ignored; -1: none of them
  const T* temperature;  // or null: temperature_value
  int temperature_stride;
  T temperature_value, inverse_temperature;
  const T* grad_output;
  int grad_output_stride;
  T* grad_temperature;

  T kd_weight, ce_weight, alpha, beta;  // of `config`, in the arithmetic's type
  T over_label;                         // infinity where no class is above the label, else 0
  bool decoupled, with_ce, moments;
  T power;  // of a class's exponential, which the cross-entropy of modes but the general one has; 0: there is none

  // Lanes a row (Kind::Lanes); blocks a row (Kind::Block); blocks or clusters of the grid, and how many rows these take at
  // a time; how many of their turns take all rows.
  int log_lanes, cluster, groups, step;
  int64_t tiles;
  ListPlaces list;
  int totals, merging, stage, pending;  // as the lists' places
  // The entries of rows that have no room for them, which a launch of its own takes; of the other rows 0.
  int32_t* overflow;
  unsigned long long* overflowed;  // the call's number where there is such a row; else what memory holds
  int long_blocks;                 // of that launch, those that have lists in device memory; of the other launches 0

  // Results: [rows], or [1] where the rows are reduced.
  bool reduced, mean;
  T *loss, *kd, *ce;
  const unsigned* counts;  // rows that count, by the block that counted; null: each block counts them itself
  int count_blocks;
  Totals* partials;                   // [partials_all], by block
  int partials_before, partials_all;  // blocks of the launches before, and with this one's
  unsigned long long* ticket;         // where the rows are reduced, else null
  unsigned long long nonce;
};

// How the kernels share a call's rows.
struct Launch {
  int blocks, threads, cluster, shared_bytes;
  bool overlaps;  // may begin while the launch before runs, and waits for it itself
};

// Bytes of what the threads of a row put together at a time, at most. Little of shared memory lets more blocks of columns
// run at once.
constexpr int value_bytes(Kind kind, Mode mode) { return kind == Kind::Columns && mode != Mode::General ? 16 : kPartialBytes; }

// A call's ticket: its number, and in so many bits the blocks that have ended.
constexpr int kTicketBits = 24;

// Shared memory for the vectors of a warp that holds its rows, of lanes with room for a float of each class beside the
// teacher's logits.
constexpr int stage_bytes(Kind kind, int held, int width) {
  return 32 * held * (2 * 16 + (kind == Kind::Lanes && width > 4 ? 4 * width : 0));
}

// f(a value of the type).
template <typename F>
auto with_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::Float) return f(float{});
  if (dtype == Dtype::BFloat16) return f(BFloat16{});
  if (dtype == Dtype::Half) return f(Half{});
  return f(double{});
}

const Device& device();
// Lets a kernel have all of a block's shared memory and of a cluster's blocks, above what every launch may have.
cudaError_t grant_most(const void* kernel, const Device& device);
// The same where a launch needs it.
template <typename Kernel>
cudaError_t grant(Kernel* kernel, size_t shared_bytes) {
  return shared_bytes > kGrantedShared ? grant_most(reinterpret_cast<const void*>(kernel), device()) : cudaSuccess;
}
// The blocks that a cluster of the current device may have, as Device says.
int most_cluster(const Device& device);

// Clusters of blocks that hold rows, of such a shape, that run at once.
int resident_clusters(const Shape& shape, Mode mode);

// X: float, BFloat16, Half.
template <typename X>
cudaError_t launch_rows(const Shape& shape, Mode mode, const Launch& launch, const Params<float>& p, cudaStream_t stream);

// Tail::Bucket, unreduced, with scratch of its own.
size_t bucket_scratch_bytes(const LossArgs& args);
cudaError_t run_bucket(const LossArgs& args, void* scratch, cudaStream_t stream);

// Any dtypes and layouts; T: float, double.
template <typename T>
cudaError_t launch_mixed(const Shape& shape, Mode mode, const Launch& launch, const Params<T>& p, cudaStream_t stream);

}  // namespace cuda
}  // namespace sortkd
