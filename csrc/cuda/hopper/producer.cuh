// SPDX-License-Identifier: BSD-3-Clause
// The warps that fill shared memory: the loader, one thread of which walks the tiles and starts
// every copy, and the inspectors, which look through tiles of values that the mask cuts.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/hopper/band.cuh"
#include "cuda/hopper/call.h"
#include "cuda/hopper/shared_map.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"

namespace online_attention::cuda::hopper {

// The tile after `index` for this block. Equal tiles go round the blocks; others are taken by
// whoever is free, the longest first.
__device__ __forceinline__ uint32_t next_index(const ForwardCall& call, uint32_t index) {
  if (call.taken == nullptr) return index + gridDim.x;
  const uint32_t taken = atomicAdd(call.taken, 1u);
  // Every block asks until it gets none, so that there are as many answers as tiles.
  if (taken + 1 == call.plan.tiles()) *call.taken = 0;
  return gridDim.x + taken;
}

template <ForwardConfig kConfig>
__device__ __forceinline__ Tile tile_at(const ForwardCall& call, uint32_t index) {
  const TilePlan& plan = call.plan;
  const TileCoord at = plan.locate_led(index);
  const int32_t row_begin = call.first_query * plan.pack + at.q_tile * kConfig.tile_m();
  const int32_t row_end = min(row_begin + kConfig.tile_m(), call.last_query * plan.pack);
  const int32_t q_begin = plan.query_of(row_begin), q_end = plan.query_of(row_end - 1) + 1;
  KvRange keys = call.args.mask.kv_range(q_begin, q_end);
  keys.begin -= keys.begin % kConfig.tile_n;
  keys = plan.cut_to_split(keys, at.split);
  const KvRange plain = seen_by_all(call.args.mask, q_begin, q_end);
  return {.b = at.b,
          .h = at.h,
          .row_begin = row_begin,
          .kv_begin = keys.begin,
          .kv_blocks = ceil_div(keys.size(), kConfig.tile_n),
          .plain_begin = plain.begin,
          .plain_end = plain.end,
          .split = at.split};
}

// Whether some row of the tile does not see some key of the key tile at `kv`.
template <ForwardConfig kConfig>
__device__ __forceinline__ bool is_cut(const Tile& tile, int32_t kv) {
  return kv < tile.plain_begin || kv + kConfig.tile_n > tile.plain_end;
}

// Whether the inspectors look through its values.
template <ForwardConfig kConfig>
__device__ __forceinline__ bool is_inspected(const ForwardCall& call, const Tile& tile,
                                             int32_t kv) {
  return call.args.mask.is_banded() && is_cut<kConfig>(tile, kv);
}

template <ForwardConfig kConfig>
struct Loader {
  using Map = SharedMap<kConfig>;
  static constexpr int kColumns = ForwardConfig::kColumns;
  const ForwardCall& call;
  const Map& smem;
  typename Map::QPlace q;
  typename Map::TilePlace opened;
  typename Map::KvPlace k, v;

  __device__ __forceinline__ void load_q(const Tile& tile) {
    const uint32_t full = smem.q_full(q.stage);
    const TensorBox& box = call.q;
    // A box has 64 rows: 64 / pack queries of pack heads each.
    const TilePlan& plan = call.plan;
    const int32_t q_idx = plan.query_of(tile.row_begin), rows_to_queries = 64 / plan.pack;
    const int32_t head = tile.h / plan.pack;
    ptx::mbarrier_arrive_expect(full, kConfig.q_bytes());
#pragma unroll
    for (int group = 0; group < kConfig.consumers; ++group) {
#pragma unroll
      for (int c = 0; c < kConfig.head_boxes(); ++c) {
        const uint32_t target = smem.q(q.stage) + group * kConfig.q_rows_bytes() + c * 64 * 128;
        ptx::tma_load(target, box.map, full, c * kColumns, 0, q_idx + group * rows_to_queries,
                      head * box.step_h, tile.b * box.step_b);
      }
    }
  }
  __device__ __forceinline__ void load_k(const Tile& tile, int32_t h_kv, int32_t kv) {
    wait(smem.k_empty(k.stage), k.phase ^ 1);
    const uint32_t full = smem.k_full(k.stage);
    const TensorBox& box = call.k;
    ptx::mbarrier_arrive_expect(full, kConfig.k_bytes());
#pragma unroll
    for (int c = 0; c < kConfig.head_boxes(); ++c) {
      ptx::tma_load(smem.k(k.stage) + c * kConfig.tile_n * 128, box.map, full, c * kColumns, kv,
                    h_kv * box.step_h, tile.b * box.step_b);
    }
    k.advance();
  }
  __device__ __forceinline__ void load_v(const Tile& tile, int32_t h_kv, int32_t kv) {
    wait(smem.v_empty(v.stage), v.phase ^ 1);
    const bool inspect = is_inspected<kConfig>(call, tile, kv);
    const uint32_t full = inspect ? smem.v_landed(v.stage) : smem.v_full(v.stage);
    const TensorBox& box = call.v;
    ptx::mbarrier_arrive_expect(full, kConfig.v_bytes());
#pragma unroll
    for (int c = 0; c < kConfig.value_boxes(); ++c) {
      ptx::tma_load(smem.v(v.stage) + c * kConfig.tile_n * 128, box.map, full, c * kColumns, kv,
                    h_kv * box.step_h, tile.b * box.step_b);
    }
    v.advance();
  }

  // Where there is room for two query tiles, the queries of the next one come while one is
  // computed; otherwise after its last keys and the first of the next.
  static constexpr bool kLooksAhead = kConfig.q_stages > 1;

  // Starts the copies of the next query tile, or tells that there is none.
  __device__ __forceinline__ void open_tile(uint32_t index, uint32_t tiles) {
    Tile tile;
    tile.row_begin = -1;
    if (index < tiles) tile = tile_at<kConfig>(call, index);
    if (!kLooksAhead && index < tiles) load_first_k(tile);
    wait(smem.q_empty(q.stage), q.phase ^ 1);
    smem.tile(opened.stage) = tile;
    opened.advance();
    if (index < tiles) {
      load_q(tile);
    } else {
      ptx::mbarrier_arrive(smem.q_full(q.stage));
    }
    q.advance();
  }

  __device__ __forceinline__ void load_first_k(const Tile& tile) {
    const int32_t last = tile.kv_blocks - 1;
    if (last >= 0) load_k(tile, tile.h / call.plan.group, tile.kv_begin + last * kConfig.tile_n);
  }

  // One thread. Keys come one tile before their values, in the order in which they are needed.
  __device__ __forceinline__ void run() {
    const auto tiles = static_cast<uint32_t>(call.plan.tiles());
    // With how many key tiles still to load the next query tile is chosen and opened. Where whoever
    // is free takes it, not earlier than it must be; the answer takes a while.
    const int32_t take_at = call.taken == nullptr ? INT32_MAX : 3;
    const int32_t open_at = call.taken == nullptr ? INT32_MAX : 1;
    uint32_t index = blockIdx.x;
    open_tile(index, tiles);
    for (typename Map::TilePlace t;; t.advance()) {
      const Tile& tile = smem.tile(t.stage);
      if (tile.row_begin < 0) return;
      const int32_t h_kv = tile.h / call.plan.group, last = tile.kv_blocks - 1;
      const int32_t second = max(last - 1, -1);
      if constexpr (kLooksAhead) load_first_k(tile);
#pragma unroll 1
      for (int32_t block = second; block >= -1; --block) {
        const int32_t kv = tile.kv_begin + block * kConfig.tile_n;
        if (block >= 0) load_k(tile, h_kv, kv);
        if (block < last) load_v(tile, h_kv, kv + kConfig.tile_n);
        if (block == min(second, take_at)) index = next_index(call, index);
        if (kLooksAhead && block == min(second, open_at)) open_tile(index, tiles);
      }
      if constexpr (!kLooksAhead) open_tile(index, tiles);
    }
  }
};

// Rows that see no key: out = 0, lse = -inf. By the inspectors of all blocks.
template <typename Element>
__device__ __forceinline__ void fill_empty_rows(const ForwardCall& call, int thread) {
  const Shape& shape = call.args.shape;
  const int64_t behind = shape.S_q - call.last_query, rows = call.first_query + behind;
  const int64_t size = rows * shape.B * shape.H;
  constexpr int kThreads = kInspectors * 32;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + thread; i < size;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t head = i / rows, r = i % rows;
    const int64_t q_idx = r < call.first_query ? r : r + call.last_query - call.first_query;
    Element* out = call.args.out.row<Element>(head / shape.H, head % shape.H, q_idx);
    for (int64_t d = 0; d < shape.D_v; ++d) out[d] = static_cast<Element>(0.0f);
    static_cast<float*>(call.args.lse)[head * shape.S_q + q_idx] = -kInfinity<float>;
  }
}

// Whether the 16-byte pieces of a tile from `begin` to `end`, `step` apart, hold Inf or NaN: 0
// times one of them is NaN, which stays in a sum.
template <typename Element>
__device__ __forceinline__ bool has_nonfinite(uint32_t begin, uint32_t end, uint32_t step) {
  using Pair = PairOf<Element>;
  const Pair zero = zero_pair<Element>();
  Pair sums[4] = {zero, zero, zero, zero};
#pragma unroll 4
  for (uint32_t address = begin; address < end; address += step) {
    uint32_t words[4];
    ptx::load_shared(words, address);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sums[w] = __hfma2(reinterpret_cast<const Pair&>(words[w]), zero, sums[w]);
    }
  }
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) bits |= reinterpret_cast<const uint32_t&>(sums[w]);
  return (bits & 0x7fff7fffu) != 0;
}

// Replaces them by zeros.
template <typename Element>
__device__ __forceinline__ void clear_nonfinite(uint32_t begin, uint32_t end, uint32_t step) {
#pragma unroll 1
  for (uint32_t address = begin; address < end; address += step) {
    uint32_t words[4];
    ptx::load_shared(words, address);
#pragma unroll
    for (uint32_t& word : words) word = without_nonfinite<Element>(word);
    ptx::store_shared(address, words);
  }
  ptx::fence_async_proxy();
}

// Where a key is hidden from some rows of the tile and seen by others, its value must not reach
// the former as 0 * NaN. So the inspectors replace Inf and NaN in such tiles by zeros, and the
// consumers, told so, add them to the rows that see them before they store (add_nonfinite). They
// run ahead of the consumers, which wait only where they are late. `warp` from 0 to kInspectors.
template <typename Element, ForwardConfig kConfig>
__device__ __forceinline__ void inspect_values(const ForwardCall& call,
                                               const SharedMap<kConfig>& smem, int warp) {
  using Map = SharedMap<kConfig>;
  const uint32_t lane = threadIdx.x % 32u;
  fill_empty_rows<Element>(call, warp * 32 + lane);
  typename Map::QPlace q;
  typename Map::TilePlace t;
  typename Map::KvPlace v;
  uint32_t landed_phases = 0;  // one bit for each stage
  for (;; q.advance(), t.advance()) {
    wait(smem.q_full(q.stage), q.phase);
    const Tile tile = smem.tile(t.stage);
    __syncwarp();
    if (tile.row_begin < 0) return;
    if (lane == 0) ptx::mbarrier_arrive(smem.q_empty(q.stage));
    for (int32_t block = tile.kv_blocks - 1; block >= 0; --block, v.advance()) {
      if (!is_inspected<kConfig>(call, tile, tile.kv_begin + block * kConfig.tile_n)) continue;
      wait(smem.v_landed(v.stage), landed_phases >> v.stage & 1);
      landed_phases ^= 1u << v.stage;
      const uint32_t begin = smem.v(v.stage) + (warp * 32 + lane) * 16;
      const uint32_t end = smem.v(v.stage) + kConfig.v_bytes();
      constexpr uint32_t kStep = kInspectors * 32 * 16;
      const bool found = has_nonfinite<Element>(begin, end, kStep);
      if (found) clear_nonfinite<Element>(begin, end, kStep);
      const bool any = ptx::barrier_or(kInspectorBarrier, kInspectors * 32, found);
      if (warp == 0 && lane == 0) {
        smem.nonfinite(v.stage) = any;
        ptx::mbarrier_arrive(smem.v_full(v.stage));
      }
    }
  }
}

}  // namespace online_attention::cuda::hopper
