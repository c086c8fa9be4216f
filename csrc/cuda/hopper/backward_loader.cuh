// SPDX-License-Identifier: BSD-3-Clause
// The two threads that start every copy into shared memory, and the walk over a block's steps.
#pragma once

#include "cuda/hopper/backward_call.h"
#include "cuda/hopper/backward_map.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/tma.cuh"

namespace online_attention::cuda::hopper {

// The queries that see all keys of [kv_begin, kv_end).
__device__ __forceinline__ QRange seen_by_all_of(const Mask& mask, int32_t kv_begin,
                                                 int32_t kv_end) {
  if (kv_end > mask.s_kv) return {0, 0};
  constexpr int64_t kNone = Mask::kUnbounded;
  const int64_t begin =
      mask.diagonal_max == Mask::kUnbounded ? 0 : int64_t{kv_end} - 1 - mask.diagonal_max;
  const int64_t end =
      mask.diagonal_min == -Mask::kUnbounded ? kNone : kv_begin + int64_t{1} - mask.diagonal_min;
  return {static_cast<int32_t>(min(max(begin, int64_t{0}), kNone)),
          static_cast<int32_t>(max(min(end, kNone), int64_t{0}))};
}

// Writes it field by field: few registers are at hand.
template <BackwardConfig kConfig>
__device__ __forceinline__ void set_key_tile(KeyTile& tile, const BackwardCall& call,
                                             uint32_t index) {
  const BackwardCoord at = call.plan.locate(index);
  const int32_t kv_begin = at.kv_tile * BackwardConfig::kTileN;
  const int32_t kv_end = kv_begin + BackwardConfig::kTileN;
  const Mask& mask = call.args.mask;
  tile.b = at.b;
  tile.h_kv = at.h_kv;
  tile.kv_begin = kv_begin;
  const QRange plain = seen_by_all_of(mask, kv_begin, kv_end);
  tile.plain_begin = plain.begin;
  tile.plain_end = plain.end;
  const QRange queries = mask.q_range(kv_begin, kv_end, static_cast<int32_t>(call.args.shape.S_q));
  tile.steps = 0;
  if (queries.size() == 0) return;
  const int32_t begin = queries.begin / kConfig.tile_m, end = ceil_div(queries.end, kConfig.tile_m);
  tile.q_tile_begin = begin;
  tile.q_tile_end = end;
  tile.steps = (end - begin) * call.plan.group;
  // Blocks of a head that run side by side keep apart, or all would add to the same dQ.
  const auto apart = static_cast<uint32_t>(at.kv_tile) * uint64_t{static_cast<uint32_t>(end)};
  tile.q_tile_first = mask.is_banded() ? begin : static_cast<int32_t>(apart / call.plan.kv_tiles);
}

// A step of a block: a query tile of one head. Heads of the group in turn, tiles in ascending order
// from the first one on, then those before it.
struct QueryStep {
  int32_t h, q_tile;

  __device__ __forceinline__ void advance(const KeyTile& tile) {
    if (++q_tile == tile.q_tile_end) q_tile = tile.q_tile_begin;
    if (q_tile == tile.q_tile_first) ++h;
  }
};
__device__ __forceinline__ QueryStep first_step(const KeyTile& tile, int32_t group) {
  return {tile.h_kv * group, tile.q_tile_first};
}
// Among the query tiles of all heads.
__device__ __forceinline__ uint32_t tile_index(const BackwardCall& call, const KeyTile& tile,
                                               const QueryStep& step) {
  const uint32_t head = tile.b * static_cast<uint32_t>(call.args.shape.H) + step.h;
  return head * call.plan.q_tiles + step.q_tile;
}

template <BackwardConfig kConfig>
struct BackwardLoader {
  using Map = BackwardMap<kConfig>;
  const BackwardCall& call;
  const Map& smem;

  __device__ __forceinline__ void load_keys(const TensorBox& box, uint32_t target, uint32_t full,
                                            const KeyTile& tile) const {
    ptx::mbarrier_arrive_expect(full, kConfig.kv_bytes());
#pragma unroll
    for (int c = 0; c < kConfig.boxes(); ++c) {
      ptx::tma_load(target + c * BackwardConfig::kTileN * BackwardConfig::kRowBytes, box.map, full,
                    c * BackwardConfig::kColumns, tile.kv_begin, tile.h_kv * box.step_h,
                    tile.b * box.step_b);
    }
  }
  // Rows of Q and their lse, or rows of dO and their delta.
  __device__ __forceinline__ void load_rows(const TensorBox& box, const float* terms,
                                            uint32_t target, uint32_t target_terms, uint32_t full,
                                            const KeyTile& tile, const QueryStep& step) const {
    ptx::mbarrier_arrive_expect(full, kConfig.q_bytes() + kConfig.terms_bytes());
#pragma unroll
    for (int c = 0; c < kConfig.boxes(); ++c) {
      ptx::tma_load(target + c * kConfig.q_box_bytes(), box.map, full, c * BackwardConfig::kColumns,
                    step.q_tile * kConfig.tile_m, step.h * box.step_h, tile.b * box.step_b);
    }
    ptx::bulk_load(target_terms, terms + int64_t{tile_index(call, tile, step)} * kConfig.tile_m,
                   kConfig.terms_bytes(), full);
  }

  // The key tile after `index` for this block: those of a call without a mask go round the blocks,
  // others are taken by whoever is free, the longest first.
  __device__ __forceinline__ uint32_t next_index(uint32_t index) const {
    if (call.buffers.taken == nullptr) return index + gridDim.x;
    return gridDim.x + atomicAdd(call.buffers.taken, 1u);
  }

  // One thread, which chooses the key tiles and brings keys and values as soon as those before them
  // have been read.
  __device__ __forceinline__ void run_keys() const {
    const auto tiles = static_cast<uint32_t>(call.plan.blocks());
    uint32_t index = blockIdx.x;
#pragma unroll 1
    for (uint32_t count = 0;; ++count) {
      KeyTile& tile = smem.tile(count);
      const bool exists = index < tiles;
      if (exists) {
        set_key_tile<kConfig>(tile, call, index);
        index = next_index(index);  // early: the answer takes a while
      } else {
        tile.steps = -1;
      }
      ptx::mbarrier_arrive(smem.tile_full(count));
      wait(smem.kv_empty(), (count % 2) ^ 1);
      if (tile.steps > 0) {
        load_keys(call.k, smem.k(), smem.k_full(), tile);
        load_keys(call.v, smem.v(), smem.v_full(), tile);
      } else {
        ptx::mbarrier_arrive(smem.k_full());
        ptx::mbarrier_arrive(smem.v_full());
      }
      if (!exists) return;
    }
  }
  // One thread, which brings queries and dO, the first of a key tile while the one before is
  // computed.
  __device__ __forceinline__ void run_queries() const {
    uint32_t i = 0;  // steps of all key tiles
#pragma unroll 1
    for (uint32_t count = 0;; ++count) {
      wait(smem.tile_full(count), count / 2 % 2);
      const KeyTile& tile = smem.tile(count);
      if (tile.steps < 0) return;
      QueryStep step = first_step(tile, call.plan.group);
#pragma unroll 1
      for (int32_t n = tile.steps; n > 0; --n, ++i) {
        const int stage = i % Map::kStages;
        const uint32_t phase = i / Map::kStages % 2;
        wait(smem.q_empty(stage), phase ^ 1);
        load_rows(call.q, call.buffers.lse2, smem.q(stage), smem.lse2(stage), smem.q_full(stage),
                  tile, step);
        wait(smem.dout_empty(stage), phase ^ 1);
        load_rows(call.dout, call.buffers.delta, smem.dout(stage), smem.delta(stage),
                  smem.dout_full(stage), tile, step);
        step.advance(tile);
      }
    }
  }
};

}  // namespace online_attention::cuda::hopper
