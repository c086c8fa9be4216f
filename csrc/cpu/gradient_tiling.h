// SPDX-License-Identifier: BSD-3-Clause
// How backward.cpp cuts the problem: the query rows of a kv head into sets, its keys into tiles.
#pragma once

#include <algorithm>
#include <thread>

#include "cpu/gradient_tile.h"

namespace online_attention::cpu {

// Sums depend on the sets and on dq_keys, so these follow from the lengths and the group alone.
struct GradientTiling {
  int64_t queries, heads;       // of a set
  int64_t q_tiles, head_tiles;  // of a kv head
  int64_t dq_keys;              // of a part of dq
  int64_t keys;                 // of a tile: those of one part, or of two
  int64_t key_tiles;

  explicit GradientTiling(const Shape& s) {
    constexpr int64_t kBlockRows = 12;  // of the widest kernel, a multiple of the others'
    q_tiles = ceil_div<int64_t>(s.S_q, QueryRows::kMaxRows);
    queries = std::min(s.S_q, ceil_div(ceil_div(s.S_q, q_tiles), kBlockRows) * kBlockRows);
    q_tiles = ceil_div(s.S_q, queries);
    heads = std::clamp<int64_t>(QueryRows::kMaxRows / queries, 1, s.group());
    head_tiles = ceil_div(s.group(), heads);
    // Two at least, unless there are few keys: one head alone then keeps two threads busy.
    const int64_t most = std::max<int64_t>(ceil_div<int64_t>(s.S_kv, KeyTile::kMaxKeys), 2);
    dq_keys = ceil_div(ceil_div(s.S_kv, most), kPanelKeys) * kPanelKeys;
    // Where heads do that, the rows that see a tile are packed for both parts at once.
    const bool fits = s.S_kv <= KeyTile::kMaxKeys && 2 * dq_keys <= KeyTile::kMaxKeys;
    keys = fits && fill_cores(s.B * s.H_kv) ? 2 * dq_keys : dq_keys;
    key_tiles = ceil_div(s.S_kv, keys);
  }
  int64_t sets() const { return head_tiles * q_tiles; }  // of a kv head

 private:
  static constexpr int64_t kPanelKeys = 32;  // of the widest kernel, a multiple of the others'

  static bool fill_cores(int64_t tasks) {
    static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    return tasks % cores == 0 || tasks >= 4 * cores;
  }
};

}  // namespace online_attention::cpu
