// SPDX-License-Identifier: BSD-3-Clause
// Where things lie in the shared memory of the backward for wide heads, and its barriers.
#pragma once

#include <cstddef>

#include "cuda/hopper/shared_map.cuh"
#include "cuda/hopper/wide_backward_config.h"

namespace online_attention::cuda::hopper {

template <WideBackwardConfig kConfig>
struct WideBackwardMap {
  static_assert(kConfig.fits());
  static constexpr int kStages = kConfig.stages, kPairStages = kConfig.pair_stages;
  using QueryPlace = Place<kStages>;     // of Q and dO
  using PairPlace = Place<kPairStages>;  // of P and dS

  uint32_t base;  // a multiple of 1024
  unsigned char* generic;

  // A tile as smem_descriptor takes it: addresses of a cluster's second block have its rank in bits
  // that the descriptor has for something else.
  __device__ __forceinline__ static uint32_t operand(uint32_t tile) { return tile & 0x3ffffu; }

  __device__ __forceinline__ uint32_t k() const { return base; }
  __device__ __forceinline__ uint32_t v() const { return base + kConfig.v_offset(); }
  __device__ __forceinline__ uint32_t q(int stage) const {
    return base + kConfig.q_offset() + stage * kConfig.q_bytes();
  }
  __device__ __forceinline__ uint32_t dout(int stage) const {
    return base + kConfig.dout_offset() + stage * kConfig.dout_bytes();
  }
  // Two boxes of the other block's keys.
  __device__ __forceinline__ uint32_t other_k() const { return base + kConfig.other_k_offset(); }
  // P of a query tile, a thread's pairs in pieces of 16 bytes; then dS in its place, a row for each
  // query, whose columns are the keys.
  __device__ __forceinline__ uint32_t pairs(int stage) const {
    return base + kConfig.pairs_offset() + stage * WideBackwardConfig::kPairBytes;
  }
  // dS of the other block.
  __device__ __forceinline__ uint32_t other_ds(int stage) const {
    return base + kConfig.other_ds_offset() + stage * WideBackwardConfig::kPairBytes;
  }
  __device__ __forceinline__ uint32_t lse2(int stage) const {
    return base + kConfig.terms_offset() + stage * WideBackwardConfig::kTermsBytes;
  }
  __device__ __forceinline__ uint32_t delta(int stage) const {
    return base + kConfig.terms_offset() + (kStages + stage) * WideBackwardConfig::kTermsBytes;
  }
  // NaN for a key that held Inf or NaN, else 0; written where `marked`.
  __device__ __forceinline__ uint32_t mark(int key) const {
    return base + kConfig.marks_offset() + key * 4;
  }
  __device__ __forceinline__ KeyTile& tile() const {
    return *reinterpret_cast<KeyTile*>(generic + kConfig.tile_offset());
  }

  // Where its last field is; not for a descriptor.
  __device__ __forceinline__ uint32_t tile_end() const {
    return base + kConfig.tile_offset() + static_cast<uint32_t>(offsetof(KeyTile, end));
  }

  __device__ __forceinline__ uint32_t barrier(int index) const {
    return base + kConfig.barrier_offset() + index * 8;
  }
  __device__ __forceinline__ uint32_t k_full() const { return barrier(0); }
  __device__ __forceinline__ uint32_t v_full() const { return barrier(1); }
  __device__ __forceinline__ uint32_t added_full() const { return barrier(2); }
  __device__ __forceinline__ uint32_t added_empty() const { return barrier(3); }
  __device__ __forceinline__ uint32_t of_queries(int kind, int stage) const {
    return barrier(4 + kind * kStages + stage);
  }
  __device__ __forceinline__ uint32_t q_full(int stage) const { return of_queries(0, stage); }
  __device__ __forceinline__ uint32_t q_empty(int stage) const { return of_queries(1, stage); }
  __device__ __forceinline__ uint32_t dout_full(int stage) const { return of_queries(2, stage); }
  __device__ __forceinline__ uint32_t dout_empty(int stage) const { return of_queries(3, stage); }
  __device__ __forceinline__ uint32_t of_pairs(int kind, int stage) const {
    return barrier(4 + 4 * kStages + kind * kPairStages + stage);
  }
  // One for each warp: it reads what the warp of the same number writes.
  __device__ __forceinline__ uint32_t p_full(int stage, int warp) const {
    return of_pairs(warp, stage);
  }
  __device__ __forceinline__ uint32_t ds_full(int stage) const { return of_pairs(4, stage); }
  __device__ __forceinline__ uint32_t other_ds_full(int stage) const { return of_pairs(5, stage); }
  __device__ __forceinline__ uint32_t pairs_empty(int stage) const { return of_pairs(6, stage); }

  // By one thread, before anybody else touches a barrier.
  __device__ __forceinline__ void init_barriers() const {
    ptx::mbarrier_init(k_full(), 1);
    ptx::mbarrier_init(v_full(), 1);
    ptx::mbarrier_init(added_full(), 4);
    ptx::mbarrier_init(added_empty(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(q_full(stage), 1);
      ptx::mbarrier_init(q_empty(stage), 8);
      ptx::mbarrier_init(dout_full(stage), 1);
      ptx::mbarrier_init(dout_empty(stage), 8);
    }
    for (int stage = 0; stage < kPairStages; ++stage) {
      for (int warp = 0; warp < 4; ++warp) ptx::mbarrier_init(p_full(stage, warp), 1);
      ptx::mbarrier_init(ds_full(stage), 4);
      ptx::mbarrier_init(other_ds_full(stage), 1);
      ptx::mbarrier_init(pairs_empty(stage), 8);
    }
    ptx::fence_mbarrier_init();
  }
};

}  // namespace online_attention::cuda::hopper
