// SPDX-License-Identifier: BSD-3-Clause
// The warpgroup of the backward for wide heads that computes dQ.
#pragma once

#include "cuda/hopper/product.cuh"
#include "cuda/hopper/wide_backward_loader.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/global.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, WideBackwardConfig kConfig>
struct WideBackwardQueries : WarpgroupThread {
  using Map = WideBackwardMap<kConfig>;
  static constexpr int kBox = WideBackwardConfig::kBoxBytes;
  static constexpr int kMiddle = kConfig.boxes() % 2;  // boxes that the blocks share

  const WideBackwardCall& call;
  const Map& smem;

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }

  // Starts dQ (+)= dS K for kSize / 32 boxes of 64 columns.
  template <int kSize>
  __device__ __forceinline__ static void start(float (&dq)[kSize], uint32_t ds, uint32_t k,
                                               bool accumulate) {
    const uint64_t a = smem_descriptor(Map::operand(ds), 0),
                   b = smem_descriptor(Map::operand(k), kBox);
    ptx::held(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < WideBackwardConfig::kTileN / 16; ++step) {
      ptx::wgmma_ss<Element, ptx::Major::k, ptx::Major::mn>(
          dq, a + 2 * step, b + step * (16 * 128 / 16), step != 0 || accumulate);
    }
    ptx::wgmma_commit();
  }

  // kBoxes of dQ from `box` on, by the keys of both blocks, added to their sums.
  template <int kBoxes>
  __device__ __forceinline__ void run_boxes(const typename Map::PairPlace& pair, int box,
                                            float* target) const {
    float dq[32 * kBoxes];
    const int other_box = box - cluster_rank() * (kConfig.boxes() - WideBackwardConfig::kDqBoxes);
    start(dq, smem.pairs(pair.stage), smem.k() + box * kBox, false);
    wait(smem.other_ds_full(pair.stage), pair.phase);
    start(dq, smem.other_ds(pair.stage), smem.other_k() + other_box * kBox, true);
    ptx::wgmma_wait<0>();
    ptx::held(dq);
    if (speaks()) {
      const uint32_t empty = smem.pairs_empty(pair.stage);
      ptx::mbarrier_arrive(empty);
      ptx::mbarrier_arrive_in_cluster(ptx::address_in(empty, cluster_rank() ^ 1));
    }
    target += box * WideBackwardConfig::kDqWarpFloats + lane() * 4;
#pragma unroll
    for (int i = 0; i < 32 * kBoxes; i += 4) {
      const float four[4] = {dq[i], dq[i + 1], dq[i + 2], dq[i + 3]};
      ptx::reduce_add(target + i * 32, four);
    }
  }

  __device__ __forceinline__ void run() const {
    const KeyTile& tile = smem.tile();
    if (tile.steps == 0) return;
    WideBackwardStep step(call, tile);
    typename Map::PairPlace pair;
    wait(smem.k_full(), 0);
#pragma unroll 1
    for (int32_t n = 0; n < tile.steps; ++n) {
      wait(smem.ds_full(pair.stage), pair.phase);
      float* target = call.buffers.dq_sums + step.tile_index(call, tile) * kConfig.dq_floats() +
                      warp() * (kConfig.boxes() * WideBackwardConfig::kDqWarpFloats);
      // Block 0 has the first boxes, block 1 the last ones, and the one in the middle in turns.
      const int rank = cluster_rank();
      if (kMiddle == 0 || n % 2 == rank) {
        run_boxes<WideBackwardConfig::kDqBoxes>(
            pair, rank * (kConfig.boxes() - WideBackwardConfig::kDqBoxes), target);
      } else {
        run_boxes<1>(pair, rank * (kConfig.boxes() - 1), target);
      }
      pair.advance();
      step.advance(tile);
    }
  }
};

}  // namespace online_attention::cuda::hopper
