// SPDX-License-Identifier: BSD-3-Clause
// Where things lie in shared memory, and the barriers between those who fill and use them.
#pragma once

#include "cuda/hopper/config.h"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace online_attention::cuda::hopper {

// A place in a ring of kStages buffers, and the parity of the pass over it.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t phase) {
  while (!ptx::mbarrier_try_wait(barrier, phase)) {
  }
}

// Warps that look through values that the mask cuts, see inspect_values.
inline constexpr int kInspectors = 3;

// Barriers, named by the fact they announce. `full` is waited for by those who read, in the phase
// of their own pass; `empty` by the producer, in the phase of the pass before.
template <ForwardConfig kConfig>
struct SharedMap {
  static_assert(kConfig.fits());
  using KvPlace = Place<kConfig.stages>;
  using QPlace = Place<kConfig.q_stages>;
  using TilePlace = Place<kConfig.tile_stages()>;  // of which only `stage` is used

  uint32_t base;  // a multiple of 1024
  unsigned char* generic;

  __device__ __forceinline__ uint32_t q(int stage) const {
    return base + stage * kConfig.q_bytes();
  }
  __device__ __forceinline__ uint32_t k(int stage) const {
    return base + kConfig.k_offset() + stage * kConfig.k_bytes();
  }
  __device__ __forceinline__ uint32_t v(int stage) const {
    return base + kConfig.v_offset() + stage * kConfig.v_bytes();
  }
  __device__ __forceinline__ uint32_t barrier(int index) const {
    return base + kConfig.barrier_offset() + index * 8;
  }
  __device__ __forceinline__ uint32_t q_full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t q_empty(int stage) const {
    return barrier(kConfig.q_stages + stage);
  }
  __device__ __forceinline__ uint32_t kv_barrier(int kind, int stage) const {
    return barrier(2 * kConfig.q_stages + kind * kConfig.stages + stage);
  }
  __device__ __forceinline__ uint32_t k_full(int stage) const { return kv_barrier(0, stage); }
  __device__ __forceinline__ uint32_t k_empty(int stage) const { return kv_barrier(1, stage); }
  __device__ __forceinline__ uint32_t v_full(int stage) const { return kv_barrier(2, stage); }
  __device__ __forceinline__ uint32_t v_empty(int stage) const { return kv_barrier(3, stage); }
  // The values of a tile that the mask cuts have come; the inspectors make them v_full.
  __device__ __forceinline__ uint32_t v_landed(int stage) const { return kv_barrier(4, stage); }

  __device__ __forceinline__ Tile& tile(int stage) const {
    return reinterpret_cast<Tile*>(generic + kConfig.tile_offset())[stage];
  }
  // Whether a tile of values that the mask cuts had Inf or NaN in it.
  __device__ __forceinline__ int32_t& nonfinite(int stage) const {
    return reinterpret_cast<int32_t*>(generic + kConfig.flag_offset())[stage];
  }

  // By one thread, before anybody else touches a barrier.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = 4 * kConfig.consumers;
    for (int stage = 0; stage < kConfig.q_stages; ++stage) {
      ptx::mbarrier_init(q_full(stage), 1);
      ptx::mbarrier_init(q_empty(stage), kWarps + kInspectors);
    }
    for (int stage = 0; stage < kConfig.stages; ++stage) {
      ptx::mbarrier_init(k_full(stage), 1);
      ptx::mbarrier_init(k_empty(stage), kWarps);
      ptx::mbarrier_init(v_full(stage), 1);
      ptx::mbarrier_init(v_empty(stage), kWarps);
      ptx::mbarrier_init(v_landed(stage), 1);
    }
    ptx::fence_mbarrier_init();
  }
};

}  // namespace online_attention::cuda::hopper
