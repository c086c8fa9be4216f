// SPDX-License-Identifier: BSD-3-Clause
// How the tensor-core backward is cut into thread blocks. Host code makes the plan, kernels read
// it.
//
// A block computes dK and dV of `tile_n` keys of one key and value head. It steps through the query
// tiles that see its keys, of every query head of the group in turn, last tile first.
#pragma once

#include "core/problem.h"

namespace online_attention::cuda {

struct BackwardCoord {
  int32_t b, h_kv, kv_tile;
};

struct BackwardPlan {
  int32_t tile_m = 0, tile_n = 0;
  int32_t group = 1;      // H / H_kv
  uint32_t q_tiles = 0;   // of one query head
  uint32_t kv_tiles = 0;  // of one key and value head
  uint32_t heads = 0;     // B * H_kv
  uint32_t heads_per_batch = 1;
  uint32_t section_heads = 1;  // heads whose blocks are interleaved, see locate

  ONLINE_ATTENTION_HD int64_t blocks() const { return int64_t{heads} * kv_tiles; }
  // Query tiles of all heads.
  ONLINE_ATTENTION_HD int64_t dq_tiles() const { return int64_t{heads} * group * q_tiles; }

  // Blocks start in index order, the key tiles of a head in ascending order. Within a section,
  // whose queries, gradients and sums fit the L2 cache together, heads alternate: under a causal
  // mask the first key tiles have the most to do and so come first.
  ONLINE_ATTENTION_HD BackwardCoord locate(uint32_t index) const {
    const uint32_t section_blocks = section_heads * kv_tiles;
    const uint32_t first_head = index / section_blocks * section_heads;
    index %= section_blocks;
    const uint32_t heads_left = heads - first_head;
    const uint32_t heads_here = heads_left < section_heads ? heads_left : section_heads;
    const uint32_t head = first_head + index % heads_here;
    return {static_cast<int32_t>(head / heads_per_batch),
            static_cast<int32_t>(head % heads_per_batch), static_cast<int32_t>(index / heads_here)};
  }

  // Among the blocks that add to the dQ of query tile `q_tile`, how many come before `kv_tile`.
  ONLINE_ATTENTION_HD int32_t turn_of(const Mask& mask, int32_t s_q, int32_t q_tile,
                                      int32_t kv_tile) const {
    const int64_t end = (int64_t{q_tile} + 1) * tile_m;
    const KvRange keys =
        mask.kv_range(q_tile * tile_m, static_cast<int32_t>(end < s_q ? end : s_q));
    return kv_tile - keys.begin / tile_n;
  }
};

// Callers keep B * H below 2^31 and no size 0.
BackwardPlan plan_backward(const BackwardArgs& args, int32_t tile_m, int32_t tile_n,
                           int multiprocessors);

}  // namespace online_attention::cuda
