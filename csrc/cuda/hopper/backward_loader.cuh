// SPDX-License-Identifier: BSD-3-Clause
// The two threads that start every copy into shared memory, and the walk over a block's steps.
#pragma once

#include "cuda/hopper/backward_call.h"
#include "cuda/hopper/backward_map.cuh"
#include "cuda/hopper/band.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/tma.cuh"

namespace online_attention::cuda::hopper {

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
  const QRange plain = queries_of_all(mask, kv_begin, kv_end);
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
  tile.q_tile_first = call.buffers.added != nullptr ? end - 1
                      : mask.is_banded() ? begin
                                         : static_cast<int32_t>(apart / call.plan.kv_tiles);
}

// The steps of a key tile: heads of the group in turn; of each the query tiles in ascending order
// from the first one on, then those before it.
//
// Where key tiles add in order they go in descending order, so that those that see few queries
// begin with what others have begun with. And under a mask all heads come to a query tile before
// the next: head by head, those of fewer tiles would catch up with those that they have to wait
// for.
__device__ __forceinline__ QueryStep first_step(const BackwardCall& call, const KeyTile& tile) {
  return {tile.h_kv * call.plan.group, tile.q_tile_first};
}
__device__ __forceinline__ void advance(QueryStep& step, const BackwardCall& call,
                                        const KeyTile& tile) {
  const bool ordered = call.buffers.added != nullptr;
  if (ordered && call.args.mask.is_banded()) {
    const int32_t group = call.plan.group;
    if (++step.h < (tile.h_kv + 1) * group) return;
    step.h -= group;
    --step.q_tile;
    return;
  }
  if (ordered) {
    if (--step.q_tile < tile.q_tile_begin) step.q_tile = tile.q_tile_end - 1;
  } else if (++step.q_tile == tile.q_tile_end) {
    step.q_tile = tile.q_tile_begin;
  }
  if (step.q_tile == tile.q_tile_first) ++step.h;
}
// Among the query tiles of all heads.
__device__ __forceinline__ uint32_t tile_index(const BackwardCall& call, const KeyTile& tile,
                                               const QueryStep& step) {
  const uint32_t head = tile.b * static_cast<uint32_t>(call.args.shape.H) + step.h;
  return head * call.plan.q_tiles + step.q_tile;
}

// Where the queries of a step lie.
struct StepPlace {
  int32_t b, h, row;
  uint32_t index;  // of the query tile, among those of all heads
};

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
  // Whether the mask hides some pairs of the step.
  __device__ __forceinline__ static int32_t is_cut(const KeyTile& tile, const QueryStep& step) {
    const int32_t q_begin = step.q_tile * kConfig.tile_m;
    return q_begin < tile.plain_begin || q_begin + kConfig.tile_m > tile.plain_end;
  }
  // Rows of Q and their lse, or rows of dO and their delta, as soon as there is room.
  __device__ __forceinline__ void load_rows(const TensorBox& box, const float* terms,
                                            uint32_t target, uint32_t target_terms, uint32_t full,
                                            uint32_t empty, uint32_t phase,
                                            const StepPlace& at) const {
    wait(empty, phase);
    ptx::mbarrier_arrive_expect(full, kConfig.q_bytes() + kConfig.terms_bytes());
#pragma unroll
    for (int c = 0; c < kConfig.boxes(); ++c) {
      ptx::tma_load(target + c * kConfig.q_box_bytes(), box.map, full, c * BackwardConfig::kColumns,
                    at.row, at.h * box.step_h, at.b * box.step_b);
    }
    ptx::bulk_load(target_terms, terms + int64_t{at.index} * kConfig.tile_m, kConfig.terms_bytes(),
                   full);
  }

  // Tells the DqWriters about step i; if there is none, that there is no further one.
  __device__ __forceinline__ void set_task(uint32_t i, const KeyTile& tile,
                                           const QueryStep& step) const {
    DqTask& task = smem.task(i);
    wait(smem.task_empty(i), (i / BackwardConfig::kTasks % 2) ^ 1);
    task.last = -1;
    if (tile.steps >= 0) {
      const IndexRange adders = adders_of(call.args, call.plan, step.q_tile);
      task.index = tile_index(call, tile, step);
      task.last = adders.size() - (call.buffers.finished_by_last ? 1 : 0);
      task.place = call.buffers.added != nullptr
                       ? tile.kv_begin / BackwardConfig::kTileN - adders.begin
                       : -1;
      task.b = tile.b;
      task.h = step.h;
      task.q_begin = step.q_tile * kConfig.tile_m;
    }
    ptx::mbarrier_arrive(smem.task_full(i));
  }

  // Which key tile comes first, and next: they are taken by whoever is free. Where they add in
  // order even the first is, so that a block waits for others only that began earlier: of the order
  // in which blocks start nothing is known.
  __device__ __forceinline__ uint32_t first_index() const {
    return call.buffers.added != nullptr ? atomicAdd(call.buffers.taken, 1u) : blockIdx.x;
  }
  __device__ __forceinline__ uint32_t next_index(uint32_t tiles) const {
    if (gridDim.x >= tiles) return tiles;
    const uint32_t taken = atomicAdd(call.buffers.taken, 1u);
    return call.buffers.added != nullptr ? taken : gridDim.x + taken;
  }

  // One thread, which brings keys and values as soon as those before them have been read, and tells
  // the DqWriters what comes.
  __device__ __forceinline__ void run_keys() const {
    uint32_t i = 0;  // steps of all key tiles
#pragma unroll 1
    for (uint32_t count = 0;; ++count) {
      wait(smem.tile_full(count), count / 2 % 2);
      const KeyTile& tile = smem.tile(count);
      wait(smem.kv_empty(), (count % 2) ^ 1);
      if (tile.steps > 0) {
        load_keys(call.k, smem.k(), smem.k_full(), tile);
        load_keys(call.v, smem.v(), smem.v_full(), tile);
      } else {
        ptx::mbarrier_arrive(smem.k_full());
        ptx::mbarrier_arrive(smem.v_full());
      }
      QueryStep step = first_step(call, tile);
#pragma unroll 1
      for (int32_t n = tile.steps; n != 0; ++i) {
        set_task(i, tile, step);
        if (n < 0) return;
        --n;
        advance(step, call, tile);
      }
      ptx::mbarrier_arrive(smem.tile_empty(count));
    }
  }
  // One thread, which chooses the key tiles and brings queries and dO, the first of a key tile
  // while the one before is computed.
  __device__ __forceinline__ void run_queries() const {
    const auto tiles = static_cast<uint32_t>(call.plan.blocks());
    uint32_t index = first_index();
    uint32_t i = 0;  // steps of all key tiles
#pragma unroll 1
    for (uint32_t count = 0;; ++count) {
      KeyTile& tile = smem.tile(count);
      wait(smem.tile_empty(count), (count / 2 % 2) ^ 1);
      if (index < tiles) {
        set_key_tile<kConfig>(tile, call, index);
        tile.end = i + tile.steps;
      } else {
        tile.steps = -1;
      }
      ptx::mbarrier_arrive(smem.tile_full(count));
      if (index >= tiles) return;
      QueryStep step = first_step(call, tile);
#pragma unroll 1
      for (int32_t n = tile.steps; n > 0; --n, ++i) {
        const int stage = i % Map::kStages;
        const uint32_t phase = i / Map::kStages % 2;
        static_cast<QueryStep&>(smem.step(i)) = step;
        const StepPlace at = {tile.b, step.h, step.q_tile * kConfig.tile_m,
                              tile_index(call, tile, step)};
        if constexpr (kConfig.masked) smem.step(i).cut = is_cut(tile, step);
        load_rows(call.q, call.buffers.lse2, smem.q(stage), smem.lse2(stage), smem.q_full(stage),
                  smem.q_empty(stage), phase ^ 1, at);
        advance(step, call, tile);
        if constexpr (kConfig.masked) smem.step(i).next = n > 1 ? is_cut(tile, step) : -1;
        load_rows(call.dout, call.buffers.delta, smem.dout(stage), smem.delta(stage),
                  smem.dout_full(stage), smem.dout_empty(stage), phase ^ 1,
                  {tile.b, smem.step(i).h, smem.step(i).q_tile * kConfig.tile_m, at.index});
      }
      index = next_index(tiles);
    }
  }
};

}  // namespace online_attention::cuda::hopper
