// SPDX-License-Identifier: BSD-3-Clause
// A consumer warpgroup's main loop and epilogue.
#pragma once

#include "cuda/hopper/call.h"
#include "cuda/hopper/producer.cuh"
#include "cuda/hopper/shared_map.cuh"
#include "cuda/hopper/warpgroup_tile.cuh"
#include "cuda/ptx/barrier.cuh"

namespace online_attention::cuda::hopper {

// Named barriers (ids of ptx::barrier_sync; 0 is the block's): whose turn it is to issue products,
// and a warpgroup with itself.
inline constexpr int kTurnBarrier = 1;  // + group
inline constexpr int kGroupBarrier = 4;  // + group

template <typename Element, ForwardConfig kConfig>
struct Consumer {
  using Map = SharedMap<kConfig>;
  const ForwardCall& call;
  const Map& smem;
  int group;  // 0 .. consumers - 1
  typename Map::QPlace q;
  typename Map::KvPlace k, v;
  WarpgroupTile<Element, kConfig> rows;
  bool nonfinite;  // some value of the tile was, see inspect_values

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }
  __device__ __forceinline__ void take_turn() const {
    if constexpr (kConfig.take_turns) ptx::barrier_sync(kTurnBarrier + group, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (kConfig.take_turns) {
      const int next = group + 1 == kConfig.consumers ? 0 : group + 1;
      ptx::barrier_arrive(kTurnBarrier + next, 256);
    }
  }

  __device__ __forceinline__ void start_scores() {
    wait(smem.k_full(k.stage), k.phase);
    rows.start_scores(smem.q(q.stage) + group * kConfig.q_rows_bytes(), smem.k(k.stage));
  }
  __device__ __forceinline__ void release_k() {
    if (speaks()) ptx::mbarrier_arrive(smem.k_empty(k.stage));
    k.advance();
  }
  // After wait_values.
  __device__ __forceinline__ void start_out(const Tile& tile, int32_t kv, bool accumulate) {
    if (is_cut<kConfig>(tile, kv) && call.args.mask.is_banded()) {
      nonfinite |= smem.nonfinite(v.stage) != 0;
    }
    rows.start_out(smem.v(v.stage), accumulate);
  }
  __device__ __forceinline__ void release_v() {
    if (speaks()) ptx::mbarrier_arrive(smem.v_empty(v.stage));
    v.advance();
  }
  // For the values of this tile, or of the next.
  __device__ __forceinline__ void wait_values(bool next) {
    typename Map::KvPlace place = v;
    if (next) place.advance();
    wait(smem.v_full(place.stage), place.phase);
  }
  // The store of the last tile has read its shared memory: the next but one may be loaded there.
  __device__ __forceinline__ void release_q(int stage) {
    if (speaks()) {
      ptx::tma_store_wait_read<0>();
      ptx::mbarrier_arrive(smem.q_empty(stage));
    }
  }

  __device__ __forceinline__ bool update_softmax(const Tile& tile, int32_t kv) {
    if (call.sign != 1) rows.scale_scores(call.sign);
    if (is_cut<kConfig>(tile, kv)) rows.hide(call.args.mask, tile.q_begin + 64 * group, kv);
    return rows.update_softmax(call.scale_log2);
  }

  // The key tiles from the last to the first. The scores of a tile are computed, and turned into
  // probabilities, while the product of the tile before runs.
  __device__ __forceinline__ void attend(const Tile& tile, int released_stage) {
    int32_t kv = tile.kv_begin + (tile.kv_blocks - 1) * kConfig.tile_n;
    take_turn();
    start_scores();
    pass_turn();
    if (released_stage >= 0) release_q(released_stage);
    ptx::wgmma_wait<0>();
    ptx::held(rows.scores);
    release_k();
    update_softmax(tile, kv);
    rows.round_probabilities();
    wait_values(false);
    bool accumulate = false;
#pragma unroll 1
    for (; kv > tile.kv_begin; kv -= kConfig.tile_n) {
      take_turn();
      start_scores();                     // S = Q K^T of the next tile
      start_out(tile, kv, accumulate);    // O += P V of this one
      pass_turn();
      ptx::wgmma_wait<1>();
      ptx::held(rows.scores);
      release_k();
      const bool raised = update_softmax(tile, kv - kConfig.tile_n);
      ptx::held(rows.scores);
      // Here, not where they are needed: without a branch in between, ptxas moves most exponentials
      // behind the wait for O, and nothing overlaps.
      wait_values(true);
      ptx::wgmma_wait<0>();
      ptx::held(rows.out);
      ptx::held(rows.p);
      release_v();
      rows.round_probabilities();
      if (raised) rows.rescale(rows.alpha);
      accumulate = true;
    }
    start_out(tile, kv, accumulate);
    ptx::wgmma_wait<0>();
    ptx::held(rows.out);
    ptx::held(rows.p);
    release_v();
  }

  __device__ __forceinline__ void add_nonfinite(const Tile& tile) {
    const ForwardArgs& args = call.args;
    const Element* v = args.v.row<const Element>(tile.b, tile.h / call.plan.group, 0);
    for (int32_t block = 0; block < tile.kv_blocks; ++block) {
      const int32_t kv = tile.kv_begin + block * kConfig.tile_n;
      if (!is_cut<kConfig>(tile, kv)) continue;
      rows.add_nonfinite(args.mask, tile.q_begin + 64 * group, v, args.v.stride_s,
                         static_cast<int>(args.shape.D_v),
                         {kv, min(kv + kConfig.tile_n, args.mask.s_kv)});
    }
  }

  // Through this warpgroup's part of the Q tile, which nobody reads any more.
  __device__ __forceinline__ void store(const Tile& tile) {
    const ForwardArgs& args = call.args;
    float inverse_sum[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      SoftmaxRow<float>& row = rows.softmax[h];
      row.l = quad_sum(row.l);
      inverse_sum[h] = row.inverse_sum();  // (E9)
      const int32_t q_idx = tile.q_begin + 64 * group + rows.row(h);
      if (threadIdx.x % 4u == 0 && q_idx < args.shape.S_q) {
        const int64_t head = int64_t{tile.b} * args.shape.H + tile.h;
        static_cast<float*>(args.lse)[head * args.shape.S_q + q_idx] = row.lse();  // (E10)
      }
    }
    rows.rescale(inverse_sum);
    ptx::barrier_sync(kGroupBarrier + group, 128);
    const int warp_row = 16 * rows.warp();
    const uint32_t target = smem.q(q.stage) + group * kConfig.q_rows_bytes() +
                            warp_row * ForwardConfig::kRowBytes;
    constexpr int kBoxBytes = 64 * ForwardConfig::kRowBytes;
    rows.write_out(target, kBoxBytes);
    ptx::fence_async_proxy();
    __syncwarp();
    if (speaks()) {
      const int32_t q_idx = tile.q_begin + 64 * group + warp_row;
#pragma unroll
      for (int c = 0; c < kConfig.value_boxes(); ++c) {
        ptx::tma_store(call.out.map, target + c * kBoxBytes, c * ForwardConfig::kColumns, q_idx,
                       tile.h * call.out.step_h, tile.b * call.out.step_b);
      }
      ptx::tma_store_commit();
    }
  }

  __device__ __forceinline__ void run() {
    if (group == kConfig.consumers - 1) pass_turn();  // the first turn is group 0's
    int released_stage = -1;
    for (;; q.advance()) {
      wait(smem.q_full(q.stage), q.phase);
      const Tile tile = smem.tile(q.stage);
      if (tile.q_begin < 0) break;
      rows.softmax[0] = rows.softmax[1] = {};
      nonfinite = false;
      if (tile.kv_blocks > 0) {
        attend(tile, released_stage);
        if (nonfinite) add_nonfinite(tile);
      } else {
        if (released_stage >= 0) release_q(released_stage);
#pragma unroll
        for (float& x : rows.out) x = 0;
      }
      store(tile);
      released_stage = q.stage;
      if constexpr (kConfig.q_stages == 1) {
        release_q(released_stage);
        released_stage = -1;
      }
    }
    if (speaks()) ptx::tma_store_wait_read<0>();  // shared memory must outlive the store
  }
};

}  // namespace online_attention::cuda::hopper
