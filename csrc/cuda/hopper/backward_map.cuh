// SPDX-License-Identifier: BSD-3-Clause
// Where things lie in the backward's shared memory, and the barriers between those who fill and use
// them.
#pragma once

#include "cuda/hopper/backward_config.h"
#include "cuda/hopper/shared_map.cuh"

namespace online_attention::cuda::hopper {

template <BackwardConfig kConfig>
struct BackwardMap {
  static_assert(kConfig.fits());
  static constexpr int kStages = BackwardConfig::kStages;

  uint32_t base;  // a multiple of 1024
  unsigned char* generic;

  __device__ __forceinline__ uint32_t k() const { return base; }
  __device__ __forceinline__ uint32_t v() const { return base + kConfig.v_offset(); }
  __device__ __forceinline__ uint32_t q(int stage) const {
    return base + kConfig.q_offset() + stage * kConfig.q_bytes();
  }
  __device__ __forceinline__ uint32_t dout(int stage) const {
    return base + kConfig.dout_offset() + stage * kConfig.q_bytes();
  }
  // dS of a query tile: a box for each group, whose columns are its 64 keys.
  __device__ __forceinline__ uint32_t ds(int stage) const {
    return base + kConfig.ds_offset() + stage * kConfig.ds_bytes();
  }
  // What a warp, of both groups', is about to add to dQ.
  __device__ __forceinline__ uint32_t dq(int warp) const {
    return base + kConfig.dq_offset() + warp * kConfig.dq_warp_bytes();
  }
  // What others have added to the dQ that a group finishes; then that dQ, rounded.
  __device__ __forceinline__ uint32_t sums(int group) const {
    return base + kConfig.sums_offset() + group * 4 * kConfig.dq_warp_bytes();
  }
  __device__ __forceinline__ uint32_t lse2(int stage) const {
    return base + kConfig.terms_offset() + stage * kConfig.terms_bytes();
  }
  __device__ __forceinline__ uint32_t delta(int stage) const {
    return base + kConfig.terms_offset() + (kStages + stage) * kConfig.terms_bytes();
  }
  // NaN for a key that held Inf or NaN, else 0; written where `marked`.
  __device__ __forceinline__ uint32_t mark(int key) const {
    return base + kConfig.marks_offset() + key * 4;
  }
  // Of the i-th key tile of the block.
  __device__ __forceinline__ KeyTile& tile(uint32_t i) const {
    return reinterpret_cast<KeyTile*>(generic + kConfig.tile_offset())[i % BackwardConfig::kTiles];
  }
  // The i-th of the block.
  __device__ __forceinline__ LoadedStep& step(uint32_t i) const {
    return reinterpret_cast<LoadedStep*>(generic +
                                         kConfig.step_offset())[i % BackwardConfig::kSteps];
  }
  // Of the i-th step of the block.
  __device__ __forceinline__ DqTask& task(uint32_t i) const {
    return reinterpret_cast<DqTask*>(generic + kConfig.task_offset())[i % BackwardConfig::kTasks];
  }
  // A warp's share of all dS, where nobody reads them any more.
  __device__ __forceinline__ uint32_t ds_of_warp(int warp) const {
    return base + kConfig.ds_offset() + warp * kConfig.ds_warp_bytes();
  }

  __device__ __forceinline__ uint32_t barrier(int index) const {
    return base + kConfig.barrier_offset() + index * 8;
  }
  __device__ __forceinline__ uint32_t k_full() const { return barrier(0); }
  __device__ __forceinline__ uint32_t v_full() const { return barrier(1); }
  __device__ __forceinline__ uint32_t kv_empty() const { return barrier(14); }
  __device__ __forceinline__ uint32_t tile_full(uint32_t i) const { return barrier(15 + i % 2); }
  __device__ __forceinline__ uint32_t tile_empty(uint32_t i) const { return barrier(17 + i % 2); }
  __device__ __forceinline__ uint32_t dq_full(int group) const { return barrier(19 + group); }
  __device__ __forceinline__ uint32_t dq_empty(int group) const { return barrier(21 + group); }
  __device__ __forceinline__ uint32_t sums_full(int group) const { return barrier(23 + group); }
  __device__ __forceinline__ uint32_t task_full(uint32_t i) const {
    return barrier(25 + i % BackwardConfig::kTasks);
  }
  __device__ __forceinline__ uint32_t task_empty(uint32_t i) const {
    return barrier(27 + i % BackwardConfig::kTasks);
  }
  __device__ __forceinline__ uint32_t q_full(int stage) const { return barrier(2 + stage); }
  __device__ __forceinline__ uint32_t q_empty(int stage) const { return barrier(4 + stage); }
  __device__ __forceinline__ uint32_t dout_full(int stage) const { return barrier(6 + stage); }
  __device__ __forceinline__ uint32_t dout_empty(int stage) const { return barrier(8 + stage); }
  __device__ __forceinline__ uint32_t ds_full(int stage) const { return barrier(10 + stage); }
  __device__ __forceinline__ uint32_t ds_empty(int stage) const { return barrier(12 + stage); }

  // By one thread, before anybody else touches a barrier.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kWarps = 4 * BackwardConfig::kGroups;
    ptx::mbarrier_init(k_full(), 1);
    ptx::mbarrier_init(v_full(), 1);
    ptx::mbarrier_init(kv_empty(), kWarps);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(tile_full(i), 1);
      ptx::mbarrier_init(tile_empty(i), 1);
    }
    for (int i = 0; i < BackwardConfig::kTasks; ++i) {
      ptx::mbarrier_init(task_full(i), 1);
      ptx::mbarrier_init(task_empty(i), BackwardConfig::kGroups);
    }
    for (int group = 0; group < BackwardConfig::kGroups; ++group) {
      ptx::mbarrier_init(dq_full(group), kConfig.dq_warps(group));
      ptx::mbarrier_init(dq_empty(group), 1);
      ptx::mbarrier_init(sums_full(group), 1);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(q_full(stage), 1);
      ptx::mbarrier_init(q_empty(stage), kWarps);
      ptx::mbarrier_init(dout_full(stage), 1);
      ptx::mbarrier_init(dout_empty(stage), kWarps);
      ptx::mbarrier_init(ds_full(stage), kWarps);
      ptx::mbarrier_init(ds_empty(stage), kWarps);
    }
    ptx::fence_mbarrier_init();
  }
};

}  // namespace online_attention::cuda::hopper
