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

  // A step's turn to add: how many others come before and the counter that says how many have
  // added. Without a counter nobody waits.
  struct Turn {
    int32_t place = -1;
    int32_t* added = nullptr;
  };
  __device__ __forceinline__ Turn turn_of(const WideBackwardStep& step, const KeyTile& tile) const {
    if (call.buffers.added == nullptr) return {};
    const auto s_q = static_cast<int32_t>(call.args.shape.S_q);
    const int32_t kv_tile = tile.kv_begin / WideBackwardConfig::kClusterKeys;
    const int32_t place = call.plan.turn_of(call.args.mask, s_q, step.q_tile, kv_tile);
    return {place, step.added(call, tile)};
  }
  __device__ __forceinline__ static bool has_come(const Turn& turn) {
    return turn.place <= 0 || ptx::load_acquire(turn.added) == turn.place;
  }

  // kBoxes of dQ from `box` on, by the keys of both blocks, added to their sums.
  template <int kBoxes>
  __device__ __forceinline__ void run_boxes(const typename Map::PairPlace& pair, int box,
                                            float* target, const Turn& turn) const {
    float dq[32 * kBoxes];
    const int other_box = box - cluster_rank() * (kConfig.boxes() - WideBackwardConfig::kDqBoxes);
    start(dq, smem.pairs(pair.stage), smem.k() + box * kBox, false);
    wait(smem.other_ds_full(pair.stage), pair.phase);
    start(dq, smem.other_ds(pair.stage), smem.other_k() + other_box * kBox, true);
    const bool early = !speaks() || has_come(turn);  // asked while the products run
    ptx::wgmma_wait<0>();
    ptx::held(dq);
    if (speaks()) {
      const uint32_t empty = smem.pairs_empty(pair.stage);
      ptx::mbarrier_arrive(empty);
      ptx::mbarrier_arrive_in_cluster(ptx::address_in(empty, cluster_rank() ^ 1));
    }
    if (!early) {
      // A pause: asking all the time slows those down who are to add.
      while (!has_come(turn)) __nanosleep(32);
    }
    __syncwarp();
    target += box * WideBackwardConfig::kDqWarpFloats + lane() * 4;
    if (turn.place == 0) {
      add<true>(target, dq);
    } else {
      add<false>(target, dq);
    }
  }
  // A thread's part of dQ. The first to come stores it, so that nobody clears the sums before.
  template <bool kStores, int kSize>
  __device__ __forceinline__ static void add(float* target, const float (&dq)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float four[4] = {dq[i], dq[i + 1], dq[i + 2], dq[i + 3]};
      if constexpr (kStores) {
        ptx::store(target + i * 32, four);
      } else {
        ptx::reduce_add(target + i * 32, four);
      }
    }
  }
  // Tells who passes the turn on (WideBackwardLoader::run_turns) that the warp has added.
  __device__ __forceinline__ void pass_turn(int32_t n) const {
    __syncwarp();
    if (!speaks()) return;
    wait(smem.added_empty(), n % 2 ^ 1);
    ptx::mbarrier_arrive(smem.added_full());
  }

  __device__ __forceinline__ void run() const {
    const KeyTile& tile = smem.tile();
    if (tile.steps == 0) return;
    WideBackwardStep step(call, tile);
    typename Map::PairPlace pair;
    wait(smem.k_full(), 0);
#pragma unroll 1
    for (int32_t n = 0; n < tile.steps; ++n) {
      const Turn turn = turn_of(step, tile);
      wait(smem.ds_full(pair.stage), pair.phase);
      float* target = call.buffers.dq_sums + step.tile_index(call, tile) * kConfig.dq_floats() +
                      warp() * (kConfig.boxes() * WideBackwardConfig::kDqWarpFloats);
      // Block 0 has the first boxes, block 1 the last ones, and the one in the middle in turns,
      // which are those of the query tile: all clusters have to add a part to it in the same order.
      const int rank = cluster_rank();
      if (kMiddle == 0 || (step.q_tile + step.h) % 2 == rank) {
        run_boxes<WideBackwardConfig::kDqBoxes>(
            pair, rank * (kConfig.boxes() - WideBackwardConfig::kDqBoxes), target, turn);
      } else {
        run_boxes<1>(pair, rank * (kConfig.boxes() - 1), target, turn);
      }
      if (turn.added != nullptr) pass_turn(n);
      pair.advance();
      step.template advance<kConfig.masked>(call, tile);
    }
  }
};

}  // namespace online_attention::cuda::hopper
