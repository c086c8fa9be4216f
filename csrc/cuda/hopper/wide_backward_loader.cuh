// SPDX-License-Identifier: BSD-3-Clause
// The threads of the backward for wide heads that start every copy into shared memory, and the
// walk over a block's steps.
#pragma once

#include "cuda/hopper/band.cuh"
#include "cuda/hopper/wide_backward_call.h"
#include "cuda/hopper/wide_backward_map.cuh"
#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/global.cuh"
#include "cuda/ptx/tma.cuh"

namespace online_attention::cuda::hopper {

// Which of its cluster's blocks this is.
__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(ptx::block_index() % WideBackwardConfig::kBlocks);
}

// Of this block, in the cluster that is number `index` of the plan. Both of a cluster step through
// the queries that see some of their keys.
template <bool kMasked>
__device__ __forceinline__ void set_key_tile(KeyTile& tile, const WideBackwardCall& call,
                                             uint32_t index) {
  constexpr int32_t kTileM = WideBackwardConfig::tile_m, kTileN = WideBackwardConfig::kTileN;
  constexpr int32_t kClusterKeys = WideBackwardConfig::kClusterKeys;
  const BackwardCoord at = call.plan.locate(index);
  const int32_t cluster_begin = at.kv_tile * kClusterKeys;
  const int32_t kv_begin = cluster_begin + cluster_rank() * kTileN, kv_end = kv_begin + kTileN;
  const Mask& mask = call.args.mask;
  tile.b = at.b;
  tile.h_kv = at.h_kv;
  tile.kv_begin = kv_begin;
  const QRange plain = queries_of_all(mask, kv_begin, kv_end);
  tile.plain_begin = plain.begin;
  tile.plain_end = plain.end;
  const QRange queries = mask.q_range(cluster_begin, cluster_begin + kClusterKeys,
                                      static_cast<int32_t>(call.args.shape.S_q));
  tile.steps = 0;
  if (queries.size() == 0) return;
  const int32_t begin = queries.begin / kTileM, end = ceil_div(queries.end, kTileM);
  tile.q_tile_begin = begin;
  tile.q_tile_end = end;
  tile.steps = (end - begin) * call.plan.group;
  // Blocks of a head that run side by side keep apart, or all would add to the same dQ. Where they
  // add in order they do by waiting.
  const bool ordered = call.buffers.added != nullptr;
  const auto apart = static_cast<uint32_t>(at.kv_tile) * uint64_t{static_cast<uint32_t>(end)};
  if (ordered) {
    tile.q_tile_first = kMasked ? end - 1 : begin;
  } else {
    tile.q_tile_first = mask.is_banded() ? begin : static_cast<int32_t>(apart / call.plan.kv_tiles);
  }
}

// A step of a block: a query tile of one head. Heads of the group in turn, tiles in ascending order
// from the first one on, then those before it.
//
// Where key tiles add in order under a mask, in descending order, so that those that see few
// queries begin with what others have begun with; and all heads come to a query tile before the
// next: head by head, those of fewer tiles would catch up with those that they have to wait for.
struct WideBackwardStep {
  int32_t h, q_tile;

  __device__ __forceinline__ WideBackwardStep(const WideBackwardCall& call, const KeyTile& tile)
      : h(tile.h_kv * call.plan.group), q_tile(tile.q_tile_first) {}
  template <bool kMasked>
  __device__ __forceinline__ void advance(const WideBackwardCall& call, const KeyTile& tile) {
    if (kMasked && call.buffers.added != nullptr) {
      if (++h < (tile.h_kv + 1) * call.plan.group) return;
      h -= call.plan.group;
      --q_tile;
      return;
    }
    if (++q_tile == tile.q_tile_end) q_tile = tile.q_tile_begin;
    if (q_tile == tile.q_tile_first) ++h;
  }
  // Among the query tiles of all heads.
  __device__ __forceinline__ int64_t tile_index(const WideBackwardCall& call,
                                                const KeyTile& tile) const {
    const uint32_t head = tile.b * static_cast<uint32_t>(call.args.shape.H) + h;
    return head * call.plan.q_tiles + q_tile;
  }
  // Of this block's part of the query tile's dQ: how many have added to it.
  __device__ __forceinline__ int32_t* added(const WideBackwardCall& call,
                                            const KeyTile& tile) const {
    const auto index = static_cast<uint32_t>(tile_index(call, tile));
    return call.buffers.added + counter_place(index, cluster_rank());
  }
};

template <WideBackwardConfig kConfig>
struct WideBackwardLoader {
  using Map = WideBackwardMap<kConfig>;
  const WideBackwardCall& call;
  const Map& smem;

  template <int kBoxes>
  __device__ __forceinline__ static void load(const TensorBox& box, uint32_t target, uint32_t full,
                                              int32_t row, int32_t h, int32_t b,
                                              int first_box = 0) {
#pragma unroll
    for (int c = 0; c < kBoxes; ++c) {
      ptx::tma_load(target + c * WideBackwardConfig::kBoxBytes, box.map, full,
                    (first_box + c) * WideBackwardConfig::kColumns, row, h * box.step_h,
                    b * box.step_b);
    }
  }
  __device__ __forceinline__ const float* terms_of(const float* terms,
                                                   const WideBackwardStep& step) const {
    return terms + step.tile_index(call, smem.tile()) * WideBackwardConfig::tile_m;
  }

  // One thread: K, then Q and lse of every step.
  __device__ __forceinline__ void run_queries() const {
    const KeyTile& tile = smem.tile();
    if (tile.steps == 0) return;
    constexpr int kOtherBoxes = WideBackwardConfig::kDqBoxes;
    ptx::mbarrier_arrive_expect(smem.k_full(),
                                kConfig.q_bytes() + kOtherBoxes * WideBackwardConfig::kBoxBytes);
    load<kConfig.boxes()>(call.k, smem.k(), smem.k_full(), tile.kv_begin, tile.h_kv, tile.b);
    load<kOtherBoxes>(call.k, smem.other_k(), smem.k_full(),
                      tile.kv_begin ^ WideBackwardConfig::kTileN, tile.h_kv, tile.b,
                      cluster_rank() * (kConfig.boxes() - kOtherBoxes));
    typename Map::QueryPlace at;
    WideBackwardStep step(call, tile);
#pragma unroll 1
    for (int32_t n = tile.steps; n > 0; --n) {
      const uint32_t full = smem.q_full(at.stage);
      wait(smem.q_empty(at.stage), at.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, kConfig.q_bytes() + WideBackwardConfig::kTermsBytes);
      load<kConfig.boxes()>(call.q, smem.q(at.stage), full,
                            step.q_tile * WideBackwardConfig::tile_m, step.h, tile.b);
      ptx::bulk_load(smem.lse2(at.stage), terms_of(call.buffers.lse2, step),
                     WideBackwardConfig::kTermsBytes, full);
      step.advance<kConfig.masked>(call, tile);
      at.advance();
    }
  }
  // Another: dS of every step to the other block, from where as much is to come.
  __device__ __forceinline__ void run_exchange() const {
    constexpr int kBytes = WideBackwardConfig::kPairBytes;
    const uint32_t other = cluster_rank() ^ 1;
    typename Map::PairPlace pair;
#pragma unroll 1
    for (int32_t n = smem.tile().steps; n > 0; --n) {
      wait(smem.ds_full(pair.stage), pair.phase);
      const uint32_t full = smem.other_ds_full(pair.stage);
      ptx::mbarrier_arrive_expect(full, kBytes);
      ptx::bulk_copy_to(ptx::address_in(smem.other_ds(pair.stage), other), smem.pairs(pair.stage),
                        kBytes, ptx::address_in(full, other));
      pair.advance();
    }
  }
  // Another, where key tiles add in order: the turn to the next one, once what this one adds in a
  // step can be seen.
  __device__ __forceinline__ void run_turns() const {
    const KeyTile& tile = smem.tile();
    WideBackwardStep step(call, tile);
#pragma unroll 1
    for (int32_t n = 0; n < tile.steps; ++n) {
      wait(smem.added_full(), n % 2);
      ptx::mbarrier_arrive(smem.added_empty());
      ptx::release_add(step.added(call, tile), 1);
      step.advance<kConfig.masked>(call, tile);
    }
  }
  // Another: V, then dO and delta of every step.
  __device__ __forceinline__ void run_outputs() const {
    const KeyTile& tile = smem.tile();
    if (tile.steps == 0) return;
    ptx::mbarrier_arrive_expect(smem.v_full(), kConfig.dout_bytes());
    load<kConfig.value_boxes()>(call.v, smem.v(), smem.v_full(), tile.kv_begin, tile.h_kv, tile.b);
    typename Map::QueryPlace at;
    WideBackwardStep step(call, tile);
#pragma unroll 1
    for (int32_t n = tile.steps; n > 0; --n) {
      const uint32_t full = smem.dout_full(at.stage);
      wait(smem.dout_empty(at.stage), at.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, kConfig.dout_bytes() + WideBackwardConfig::kTermsBytes);
      load<kConfig.value_boxes()>(call.dout, smem.dout(at.stage), full,
                                  step.q_tile * WideBackwardConfig::tile_m, step.h, tile.b);
      ptx::bulk_load(smem.delta(at.stage), terms_of(call.buffers.delta, step),
                     WideBackwardConfig::kTermsBytes, full);
      step.advance<kConfig.masked>(call, tile);
      at.advance();
    }
  }
};

}  // namespace online_attention::cuda::hopper
