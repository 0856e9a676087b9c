// Kernels with one planted fault each, and the same kernels without it: what the harness must catch, and what it must
// let pass. Each runs on blocks of 64 threads with as many floats of shared memory, `n` inputs and as many outputs.
#include <cuda_runtime.h>

#include <cassert>
#include <map>

#include "faults.h"

namespace simt_faults {
namespace {

constexpr unsigned kFull = 0xffffffffu;

using Kernel = void (*)(const float* in, float* out, int n);
struct Pair {
  Kernel planted, right;
};
std::map<std::string, Pair> kernels;

#define KERNEL(name)                                                                                          \
  template <bool kPlanted>                                                                                    \
  __global__ void name(const float* in, float* out, int n);                                                   \
  [[maybe_unused]] const bool name##_is_there = kernels.emplace(#name, Pair{name<true>, name<false>}).second; \
  template <bool kPlanted>                                                                                    \
  __global__ void name([[maybe_unused]] const float* in, [[maybe_unused]] float* out, [[maybe_unused]] int n)

__device__ int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }
__device__ float* shared() { return reinterpret_cast<float*>(simt::shared_memory()); }

// Collectives that not all of their lanes reach, or not together.

KERNEL(divergent_shuffle) {
  const int i = global_thread();
  float value = in[i];
  if (!kPlanted || i % 32 < 20) value = __shfl_xor_sync(kFull, value, 1);
  out[i] = value;
}

KERNEL(shuffle_at_two_places) {
  const int i = global_thread();
  float value = in[i];
  if (kPlanted && i % 2) {
    value = __shfl_xor_sync(kFull, value, 1);
  } else {
    value = __shfl_xor_sync(kFull, value, 1);
  }
  out[i] = value;
}

KERNEL(masks_differ) {
  const int i = global_thread();
  out[i] = __shfl_xor_sync(kPlanted && i % 32 < 8 ? 0xffffu : kFull, in[i], 1);
}

KERNEL(caller_not_in_mask) {
  const int i = global_thread();
  out[i] = static_cast<float>(__ballot_sync(kPlanted ? 0xffffu : kFull, i < n));
}

KERNEL(shuffle_from_outside_the_mask) {
  const int i = global_thread();
  out[i] = in[i];
  if (i % 32 < 16) out[i] = __shfl_sync(0xffffu, in[i], kPlanted ? 20 : 3);
}

KERNEL(exited_lane_in_mask) {
  const int i = global_thread();
  out[i] = in[i];
  if (kPlanted && i == 37) return;
  __syncwarp();
}

KERNEL(barrier_not_reached_by_all) {
  const int i = global_thread();
  out[i] = in[i];
  if (!kPlanted || i < 40) __syncthreads();
}

KERNEL(barrier_at_two_places) {
  const int i = global_thread();
  out[i] = in[i];
  if (kPlanted && i >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

KERNEL(shuffle_while_others_are_at_a_barrier) {
  const int i = global_thread();
  out[i] = in[i];
  if (kPlanted && i < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Threads and blocks that depend on an order that nobody promises.

KERNEL(missing_barrier) {
  const int i = global_thread();
  shared()[i] = in[i];
  if (!kPlanted) __syncthreads();
  out[i] = shared()[n - 1 - i];
}

KERNEL(missing_warp_barrier) {
  const int i = global_thread();
  shared()[i] = in[i];
  if (!kPlanted) __syncwarp();
  out[i] = shared()[i ^ 1];
}

KERNEL(blocks_that_depend) {
  const int block = static_cast<int>(blockIdx.x);
  if (threadIdx.x) return;
  float before = 0;
  if (kPlanted) {
    if (block) before = out[block - 1];
  } else {
    for (int i = 0; i < block; ++i) before += in[i];
  }
  out[block] = before + in[block];
}

KERNEL(copy_not_waited_for) {
  const int i = global_thread();
  if (i % 4 == 0) simt::copy_async(shared() + i, in + i);
  if (!kPlanted) simt::copies_wait();
  __syncthreads();
  out[i] = shared()[i];
  simt::copies_wait();
}

KERNEL(copy_under_way_at_the_end) {
  const int i = global_thread();
  out[i] = in[i];
  if (i % 4 == 0) simt::machine.current->copies.push_back({shared() + i, in + i});
  if (!kPlanted) simt::copies_wait();
}

KERNEL(misaligned_copy) {
  const int i = global_thread();
  out[i] = in[i];
  simt::copy_async(shared() + i / 8 * 4, in + i / 8 * 4 + kPlanted);
  simt::copies_wait();
}

// Clusters of two blocks of 32 threads: each thread gets what its neighbour block's has, in the bytes from the ninth on.

__device__ unsigned other_block() { return blockIdx.x ^ 1; }
__device__ uint64_t* barrier() { return reinterpret_cast<uint64_t*>(simt::shared_memory()); }
__device__ float* received() { return shared() + 2 + threadIdx.x; }

KERNEL(cluster_barrier_not_reached_by_all) {
  const int i = global_thread();
  *received() = in[i];
  if (!kPlanted || blockIdx.x == 0) simt::cluster_barrier();
  out[i] = *(kPlanted ? received() : simt::in_block(received(), other_block()));
  if (!kPlanted) simt::cluster_barrier();
}

KERNEL(block_that_has_ended) {
  const int i = global_thread();
  *received() = in[i];
  simt::cluster_barrier();
  out[i] = *simt::in_block(received(), other_block());
  if (!kPlanted) simt::cluster_barrier();
}

template <bool kInitialised, bool kSent, bool kAwaited>
__device__ void exchange(const float* in, float* out) {
  const int i = global_thread();
  if (threadIdx.x == 0 && kInitialised) simt::mbarrier_init(barrier());
  simt::cluster_barrier();
  if (threadIdx.x == 0) simt::mbarrier_arrive_expect(barrier(), 32 * sizeof(float));
  if (kSent || i != 40) simt::sends.send(received(), in[i], barrier(), other_block());
  if (kAwaited) simt::mbarrier_wait(barrier(), 0);
  out[i] = *received();
}

KERNEL(mbarrier_without_a_start) { exchange<!kPlanted, true, true>(in, out); }
KERNEL(bytes_that_never_come) { exchange<true, !kPlanted, true>(in, out); }
KERNEL(bytes_not_waited_for) { exchange<true, true, !kPlanted>(in, out); }

// Memory.

KERNEL(shared_read_past_the_end) {
  const int i = global_thread();
  shared()[i] = in[i];
  __syncthreads();
  out[i] = shared()[i + kPlanted];
}

KERNEL(shared_write_past_the_end) {
  const int i = global_thread();
  shared()[i + kPlanted] = in[i];
  out[i] = in[i];
}

KERNEL(shared_write_before_the_start) {
  const int i = global_thread();
  shared()[i - kPlanted] = in[i];
  out[i] = in[i];
}

KERNEL(shared_read_far_away) {
  const int i = global_thread();
  shared()[i] = in[i];
  out[i] = shared()[i + kPlanted * 100000];
}

KERNEL(uninitialised_shared) {
  const int i = global_thread();
  if (!kPlanted || i < n - 1) shared()[i] = in[i];
  __syncthreads();
  out[i] = shared()[n - 1 - i];
}

KERNEL(global_read_past_the_end) {
  const int i = global_thread();
  out[i] = in[i + kPlanted];
}

KERNEL(global_write_past_the_end) {
  const int i = global_thread();
  out[i + kPlanted] = in[i];
}

KERNEL(global_write_before_the_start) {
  const int i = global_thread();
  out[i - kPlanted] = in[i];
}

KERNEL(misaligned_load) {
  const int i = 4 * global_thread();
  if (i + 4 > n) return;
  const float4 four = __ldcs(reinterpret_cast<const float4*>(in + (kPlanted ? (i + 1) % (n - 4) : i)));
  out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
}

KERNEL(misaligned_store) {
  const int i = 4 * global_thread();
  if (i + 4 > n) return;
  const float4 four{in[i], in[i + 1], in[i + 2], in[i + 3]};
  *reinterpret_cast<float4*>(out + (kPlanted ? (i + 2) % (n - 4) : i)) = four;
}

KERNEL(local_array_overrun) {
  const int i = global_thread();
  float four[4];
  for (int k = 0; k < 4; ++k) four[k] = in[i / 4 * 4 + k];
  out[i] = four[i % 4 + kPlanted];
}

KERNEL(stack_overflow) {
  const int i = global_thread();
  volatile float large[kPlanted ? 20000 : 20];
  for (volatile float& place : large) place = in[i];
  out[i] = large[7];
}

// The rest.

KERNEL(shift_by_too_much) {
  const int i = global_thread();
  out[i] = static_cast<float>(1u << (i % 32 + kPlanted));
}

KERNEL(division_by_zero) {
  const int i = global_thread();
  out[i] = static_cast<float>(n / (i + !kPlanted));
}

KERNEL(failed_assertion) {
  const int i = global_thread();
  assert(!kPlanted || i != 33);
  out[i] = in[i];
}

KERNEL(trap) {
  const int i = global_thread();
  if (kPlanted && i == 33) __trap();
  out[i] = in[i];
}

KERNEL(endless_loop) {
  const int i = global_thread();
  volatile bool on = kPlanted;
  while (on) {
  }
  out[i] = in[i];
}

KERNEL(endless_shuffling) {
  const int i = global_thread();
  float value = in[i];
  do value = __shfl_xor_sync(kFull, value, 1);
  while (kPlanted);
  out[i] = value;
}

KERNEL(copy) { out[global_thread()] = in[global_thread()]; }

}  // namespace

void run(const Launch& launch, const float* in, float* out, int n) {
  const Pair& pair = kernels.at(launch.kernel);
  simt::launch(launch.kernel.c_str(), launch.planted ? pair.planted : pair.right, launch.blocks, launch.cluster, launch.threads,
               launch.shared_bytes, in, out, n);
}

}  // namespace simt_faults
