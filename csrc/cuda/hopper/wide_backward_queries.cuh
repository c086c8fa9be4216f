// SPDX-License-Identifier: BSD-3-Clause
// The warpgroup of the backward for wide heads that computes dQ.
#pragma once

#include "cuda/hopper/product.cuh"
#include "cuda/hopper/wide_backward_loader.cuh"
#include "cuda/ptx/global.cuh"
#include "cuda/ptx/shared.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, WideBackwardConfig kConfig>
struct WideBackwardQueries : WarpgroupThread {
  using Map = WideBackwardMap<kConfig>;
  static constexpr int kBox = WideBackwardConfig::kBoxBytes;
  static constexpr int kSteps = WideBackwardConfig::kTileN / 16;
  static constexpr int kChunks = kConfig.dq_chunks;
  using Dq = float[32];  // a box of 64 columns

  const WideBackwardCall& call;
  const Map& smem;

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }

  // The warp's 16 rows of dS as an A operand.
  __device__ __forceinline__ static void load_ds(uint32_t (&a)[4 * kSteps], uint32_t ds) {
    const int at = lane(), in_matrix = at % 8, matrix = at / 8;
    const uint32_t row =
        ds + (16 * warp() + matrix % 2 * 8 + in_matrix) * WideBackwardConfig::kRowBytes;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t words[4];
      ptx::ldmatrix_x4(words, row + ((2 * k + matrix / 2) ^ in_matrix) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[4 * k + i] = words[i];
    }
  }

  // Adds the warp's rows of a box of dQ to their sums.
  __device__ __forceinline__ static void add(const Dq& dq, float* target) {
    const int at = lane();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float four[4] = {dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]};
      ptx::reduce_add(target + n * 128 + at * 4, four);
    }
  }

  __device__ __forceinline__ void run() const {
    const KeyTile& tile = smem.tile();
    if (tile.steps == 0) return;
    WideBackwardStep step(call, tile);
    typename Map::PairPlace pair;
    wait(smem.k_full(), 0);
#pragma unroll 1
    for (int32_t n = tile.steps; n > 0; --n) {
      uint32_t a[4 * kSteps];
      wait(smem.ds_full(pair.stage), pair.phase);
      load_ds(a, smem.ds(pair.stage));
      __syncwarp();
      if (speaks()) ptx::mbarrier_arrive(smem.ds_empty(pair.stage));
      float* target = call.buffers.dq_sums + step.tile_index(call, tile) * kConfig.dq_floats() +
                      warp() * (kConfig.boxes() * WideBackwardConfig::kDqWarpFloats);
      if constexpr (kChunks == 1) {
#pragma unroll
        for (int c = 0; c < kConfig.boxes(); ++c) {
          Dq dq;
          start_registers_by_columns<Element, 64, kBox>(dq, a, smem.k() + c * kBox, false);
          ptx::wgmma_wait<0>();
          ptx::held(dq);
          ptx::held(a);
          add(dq, target + c * WideBackwardConfig::kDqWarpFloats);
        }
      } else {
        Dq dq[2];
        start_registers_by_columns<Element, 64, kBox>(dq[0], a, smem.k(), false);
#pragma unroll
        for (int c = 0; c < kConfig.boxes(); ++c) {
          if (c + 1 < kConfig.boxes()) {
            start_registers_by_columns<Element, 64, kBox>(dq[(c + 1) % 2], a,
                                                          smem.k() + (c + 1) * kBox, false);
            ptx::wgmma_wait<1>();
          } else {
            ptx::wgmma_wait<0>();
            ptx::held(a);
          }
          ptx::held(dq[c % 2]);
          add(dq[c % 2], target + c * WideBackwardConfig::kDqWarpFloats);
        }
      }
      pair.advance();
      step.advance(tile);
    }
  }
};

}  // namespace online_attention::cuda::hopper
