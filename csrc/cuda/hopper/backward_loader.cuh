// SPDX-License-Identifier: BSD-3-Clause
// The thread that starts every copy into shared memory, and the walk over a block's steps.
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

template <BackwardConfig kConfig>
__device__ __forceinline__ KeyTile key_tile_at(const BackwardCall& call, uint32_t index) {
  const BackwardCoord at = call.plan.locate(index);
  const int32_t kv_begin = at.kv_tile * BackwardConfig::kTileN;
  const int32_t kv_end = kv_begin + BackwardConfig::kTileN;
  const Mask& mask = call.args.mask;
  const QRange queries =
      mask.q_range(kv_begin, kv_end, static_cast<int32_t>(call.args.shape.S_q));
  const QRange plain = seen_by_all_of(mask, kv_begin, kv_end);
  KeyTile tile = {at.b, at.h_kv, kv_begin, 0, 0, 0, plain.begin, plain.end, 0};
  if (queries.size() > 0) {
    tile.q_tile_begin = queries.begin / kConfig.tile_m;
    tile.q_tile_end = ceil_div(queries.end, kConfig.tile_m);
    tile.q_tile_first = tile.q_tile_begin;
    // Blocks of a head that run side by side keep apart, or all would add to the same dQ.
    if (!mask.is_banded()) {
      tile.q_tile_first = static_cast<int32_t>(int64_t{at.kv_tile} * tile.q_tile_end /
                                               static_cast<int32_t>(call.plan.kv_tiles));
    }
    tile.steps = (tile.q_tile_end - tile.q_tile_begin) * call.plan.group;
  }
  return tile;
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
__device__ __forceinline__ int64_t tile_index(const BackwardCall& call, const KeyTile& tile,
                                              const QueryStep& step) {
  const int64_t head = tile.b * call.args.shape.H + step.h;
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
    ptx::bulk_load(target_terms, terms + tile_index(call, tile, step) * kConfig.tile_m,
                   kConfig.terms_bytes(), full);
  }

  // One thread.
  __device__ __forceinline__ void run() const {
    const KeyTile tile = smem.tile();
    if (tile.steps == 0) return;
    QueryStep step = first_step(tile, call.plan.group);
    load_keys(call.k, smem.k(), smem.k_full(), tile);
#pragma unroll 1
    for (int32_t i = 0; i < tile.steps; ++i) {
      const int stage = i % Map::kStages;
      const uint32_t phase = i / Map::kStages % 2;
      wait(smem.q_empty(stage), phase ^ 1);
      load_rows(call.q, call.buffers.lse2, smem.q(stage), smem.lse2(stage), smem.q_full(stage),
                tile, step);
      if (i == 0) load_keys(call.v, smem.v(), smem.v_full(), tile);
      wait(smem.dout_empty(stage), phase ^ 1);
      load_rows(call.dout, call.buffers.delta, smem.dout(stage), smem.delta(stage),
                smem.dout_full(stage), tile, step);
      step.advance(tile);
    }
  }
};

}  // namespace online_attention::cuda::hopper
