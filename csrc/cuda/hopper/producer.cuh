// SPDX-License-Identifier: BSD-3-Clause
// The two warps that fill shared memory: the loader, one thread of which walks the tiles and starts
// every copy, and the inspector, which looks through tiles of values that the mask cuts.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/hopper/call.h"
#include "cuda/hopper/shared_map.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"

namespace online_attention::cuda::hopper {

// Tiles go round the blocks to and fro: with the longest first, a block that got the longest of one
// round gets the shortest of the next.
__device__ __forceinline__ uint32_t tile_index(uint32_t round) {
  const uint32_t place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  return round * gridDim.x + place;
}

// The keys that all queries of [q_begin, q_end) see.
__device__ __forceinline__ KvRange seen_by_all(const Mask& mask, int32_t q_begin, int32_t q_end) {
  const int64_t none = Mask::kUnbounded;
  const int64_t begin =
      mask.diagonal_min == -Mask::kUnbounded ? 0 : int64_t{q_end} - 1 + mask.diagonal_min;
  const int64_t end = mask.diagonal_max == Mask::kUnbounded ? none : q_begin + int64_t{1} + mask.diagonal_max;
  return {static_cast<int32_t>(min(max(begin, int64_t{0}), none)),
          static_cast<int32_t>(max(min(end, int64_t{mask.s_kv}), int64_t{0}))};
}

template <ForwardConfig kConfig>
__device__ __forceinline__ Tile tile_at(const ForwardCall& call, uint32_t index) {
  const TileCoord at = call.plan.locate(index);
  const int32_t q_begin = at.q_tile * kConfig.tile_m();
  const int32_t q_end = min(q_begin + kConfig.tile_m(), call.plan.rows);
  KvRange keys = call.args.mask.kv_range(q_begin, q_end);
  keys.begin -= keys.begin % kConfig.tile_n;
  const KvRange plain = seen_by_all(call.args.mask, q_begin, q_end);
  return {at.b,        at.h,      q_begin, keys.begin, ceil_div(keys.size(), kConfig.tile_n),
          plain.begin, plain.end, 0};
}

// Whether some row of the tile does not see some key of the key tile at `kv`.
template <ForwardConfig kConfig>
__device__ __forceinline__ bool is_cut(const Tile& tile, int32_t kv) {
  return kv < tile.plain_begin || kv + kConfig.tile_n > tile.plain_end;
}

template <ForwardConfig kConfig>
struct Loader {
  using Map = SharedMap<kConfig>;
  static constexpr int kColumns = ForwardConfig::kColumns;
  const ForwardCall& call;
  const Map& smem;
  typename Map::QPlace q;
  typename Map::KvPlace k, v;

  __device__ __forceinline__ void load_q(const Tile& tile) {
    const uint32_t full = smem.q_full(q.stage);
    const TensorBox& box = call.q;
    ptx::mbarrier_arrive_expect(full, kConfig.q_bytes());
#pragma unroll
    for (int group = 0; group < kConfig.consumers; ++group) {
#pragma unroll
      for (int c = 0; c < kConfig.head_boxes(); ++c) {
        const uint32_t target = smem.q(q.stage) + group * kConfig.q_rows_bytes() + c * 64 * 128;
        ptx::tma_load(target, box.map, full, c * kColumns, tile.q_begin + 64 * group,
                      tile.h * box.step_h, tile.b * box.step_b);
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
  __device__ __forceinline__ void load_v(const Tile& tile, int32_t h_kv, int32_t kv, bool banded) {
    wait(smem.v_empty(v.stage), v.phase ^ 1);
    const bool inspect = banded && is_cut<kConfig>(tile, kv);
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

  // One thread. Keys come one tile before their values, in the order in which they are needed.
  __device__ __forceinline__ void run() {
    const auto tiles = static_cast<uint32_t>(call.plan.tiles());
    const bool banded = call.args.mask.is_banded();
    for (uint32_t round = 0;; ++round) {
      const uint32_t index = tile_index(round);
      wait(smem.q_empty(q.stage), q.phase ^ 1);
      if (index >= tiles) {
        smem.tile(q.stage).q_begin = -1;
        ptx::mbarrier_arrive(smem.q_full(q.stage));
        return;
      }
      const Tile tile = tile_at<kConfig>(call, index);
      smem.tile(q.stage) = tile;
      load_q(tile);
      q.advance();
      const int32_t h_kv = tile.h / call.plan.group;
      for (int32_t block = tile.kv_blocks - 1; block >= 0; --block) {
        const int32_t kv = tile.kv_begin + block * kConfig.tile_n;
        load_k(tile, h_kv, kv);
        if (block < tile.kv_blocks - 1) load_v(tile, h_kv, kv + kConfig.tile_n, banded);
      }
      if (tile.kv_blocks > 0) load_v(tile, h_kv, tile.kv_begin, banded);
    }
  }
};

// Where a key is hidden from some rows of the tile and seen by others, its value must not reach
// the former as 0 * NaN. So the inspector replaces Inf and NaN in such tiles by zeros, and the
// consumers, told so, add them to the rows that see them before they store (add_nonfinite). All 32
// lanes of one warp; it runs ahead of the consumers, which wait for it only where it is late.
template <typename Element, ForwardConfig kConfig>
__device__ __forceinline__ void inspect_values(const ForwardCall& call,
                                               const SharedMap<kConfig>& smem) {
  using Map = SharedMap<kConfig>;
  const int lane = static_cast<int>(threadIdx.x % 32u);
  const bool banded = call.args.mask.is_banded();
  typename Map::QPlace q;
  typename Map::KvPlace v;
  uint32_t landed_phases = 0;  // one bit for each stage
  for (;; q.advance()) {
    wait(smem.q_full(q.stage), q.phase);
    const Tile tile = smem.tile(q.stage);
    __syncwarp();
    if (tile.q_begin < 0) return;
    if (lane == 0) ptx::mbarrier_arrive(smem.q_empty(q.stage));
    if (!banded) continue;
    for (int32_t block = tile.kv_blocks - 1; block >= 0; --block, v.advance()) {
      if (!is_cut<kConfig>(tile, tile.kv_begin + block * kConfig.tile_n)) continue;
      wait(smem.v_landed(v.stage), landed_phases >> v.stage & 1);
      landed_phases ^= 1u << v.stage;
      bool found = false;
      const uint32_t begin = smem.v(v.stage) + lane * 16;
#pragma unroll 2
      for (int piece = 0; piece < kConfig.v_bytes(); piece += 32 * 16) {
        uint32_t words[4];
        ptx::load_shared(words, begin + piece);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t finite = without_nonfinite<Element>(words[w]);
          if (finite == words[w]) continue;
          found = true;
          ptx::store_shared(begin + piece + 4 * w, finite);
        }
      }
      if (found) ptx::fence_async_proxy();
      const bool any = __any_sync(0xffffffffu, found);
      __syncwarp();
      if (lane == 0) {
        smem.nonfinite(v.stage) = any;
        ptx::mbarrier_arrive(smem.v_full(v.stage));
      }
    }
  }
}

}  // namespace online_attention::cuda::hopper
