// SPDX-License-Identifier: BSD-3-Clause
// The two threads of the backward for wide heads that start every copy into shared memory.
#pragma once

#include "cuda/hopper/backward_loader.cuh"
#include "cuda/hopper/wide_backward_map.cuh"

namespace online_attention::cuda::hopper {

template <WideBackwardConfig kConfig>
struct WideBackwardLoader {
  using Map = WideBackwardMap<kConfig>;
  const BackwardCall& call;
  const Map& smem;

  template <int kBoxes>
  __device__ __forceinline__ static void load(const TensorBox& box, uint32_t target, uint32_t full,
                                              int32_t row, int32_t h, int32_t b) {
#pragma unroll
    for (int c = 0; c < kBoxes; ++c) {
      ptx::tma_load(target + c * WideBackwardConfig::kBoxBytes, box.map, full,
                    c * WideBackwardConfig::kColumns, row, h * box.step_h, b * box.step_b);
    }
  }
  __device__ __forceinline__ const float* terms_of(const float* terms, const QueryStep& step) const {
    return terms + int64_t{tile_index(call, smem.tile(), step)} * WideBackwardConfig::tile_m;
  }

  // One thread: K, then Q and lse of every step.
  __device__ __forceinline__ void run_queries() const {
    const KeyTile& tile = smem.tile();
    if (tile.steps == 0) return;
    ptx::mbarrier_arrive_expect(smem.k_full(), kConfig.q_bytes());
    load<kConfig.boxes()>(call.k, smem.k(), smem.k_full(), tile.kv_begin, tile.h_kv, tile.b);
    typename Map::QueryPlace at;
    QueryStep step = first_step(tile, call.plan.group);
#pragma unroll 1
    for (int32_t n = tile.steps; n > 0; --n) {
      const uint32_t full = smem.q_full(at.stage);
      wait(smem.q_empty(at.stage), at.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, kConfig.q_bytes() + WideBackwardConfig::kTermsBytes);
      load<kConfig.boxes()>(call.q, smem.q(at.stage), full,
                            step.q_tile * WideBackwardConfig::tile_m, step.h, tile.b);
      ptx::bulk_load(smem.lse2(at.stage), terms_of(call.buffers.lse2, step),
                     WideBackwardConfig::kTermsBytes, full);
      step.advance(tile);
      at.advance();
    }
  }
  // Another: V, then dO and delta of every step.
  __device__ __forceinline__ void run_outputs() const {
    const KeyTile& tile = smem.tile();
    if (tile.steps == 0) return;
    ptx::mbarrier_arrive_expect(smem.v_full(), kConfig.dout_bytes());
    load<kConfig.value_boxes()>(call.v, smem.v(), smem.v_full(), tile.kv_begin, tile.h_kv, tile.b);
    typename Map::QueryPlace at;
    QueryStep step = first_step(tile, call.plan.group);
#pragma unroll 1
    for (int32_t n = tile.steps; n > 0; --n) {
      const uint32_t full = smem.dout_full(at.stage);
      wait(smem.dout_empty(at.stage), at.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, kConfig.dout_bytes() + WideBackwardConfig::kTermsBytes);
      load<kConfig.value_boxes()>(call.dout, smem.dout(at.stage), full,
                                  step.q_tile * WideBackwardConfig::tile_m, step.h, tile.b);
      ptx::bulk_load(smem.delta(at.stage), terms_of(call.buffers.delta, step),
                     WideBackwardConfig::kTermsBytes, full);
      step.advance(tile);
      at.advance();
    }
  }
};

}  // namespace online_attention::cuda::hopper
