// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/tile_plan.h"

#include <algorithm>

namespace online_attention::cuda {
namespace {

// Keys and values of the heads in one section together stay under this share of the L2 cache of
// an A100 (40 MB) or H100 (50 MB).
constexpr int64_t kSectionBytes = int64_t{32} << 20;
// Keeps section_heads * q_tiles, which the device computes in 32 bits, in range.
constexpr int64_t kMaxSectionTiles = int64_t{1} << 30;
// A split reads at least this many key tiles: fewer, and merging costs more than it saves.
constexpr int32_t kMinTilesPerSplit = 4;
constexpr int32_t kMaxSplits = 128;
// Rows times splits of one packed head: bounds the workspace, whatever S_kv is.
constexpr int32_t kMaxSplitRows = 4096;
// With batch_invariant a split holds this many key tiles, however empty the device is.
constexpr int32_t kInvariantTilesPerSplit = 16;

uint32_t section_heads(const ForwardArgs& args, const TilePlan& plan) {
  const Shape& s = args.shape;
  if (!args.mask.is_banded()) return 1;  // equal tiles: keep one head's keys in the cache
  // In floating point: of keys broadcast by a stride of 0 there may be more than 64 bits count.
  const double bytes_per_head = static_cast<double>(s.S_kv) * static_cast<double>(s.D + s.D_v) *
                                static_cast<double>(element_bytes(args.dtype) * plan.pack) /
                                static_cast<double>(s.group());
  const double most = kSectionBytes / std::max(bytes_per_head, 1.0);
  const int64_t fitting = std::clamp<int64_t>(static_cast<int64_t>(most), 1, plan.heads);
  return static_cast<uint32_t>(std::min<int64_t>(fitting, kMaxSectionTiles / plan.q_tiles + 1));
}

int32_t wanted_splits(const ForwardArgs& args, const TilePlan& plan, const TileShape& tile,
                      int multiprocessors) {
  if (!tile.splits) return 1;
  const auto kv_tiles = static_cast<int32_t>(ceil_div<int64_t>(args.shape.S_kv, tile.n));
  const int32_t most =
      std::min({kMaxSplits, kv_tiles / kMinTilesPerSplit, std::max(1, kMaxSplitRows / plan.rows)});
  if (most <= 1) return 1;
  if (args.batch_invariant) {
    return plan.q_tiles == 1 ? std::min(most, ceil_div(kv_tiles, kInvariantTilesPerSplit)) : 1;
  }
  const int64_t slots = int64_t{multiprocessors} * tile.blocks_per_sm;
  const int64_t blocks = plan.tiles();  // splits is still 1
  const auto splits = static_cast<int32_t>(std::clamp<int64_t>(slots / blocks, 1, most));
  return kv_tiles - ceil_div(kv_tiles, splits) < tile.merge_tiles ? 1 : splits;
}

}  // namespace

TilePlan plan_tiles(const ForwardArgs& args, const TileShape& tile, int multiprocessors) {
  const Shape& s = args.shape;
  TilePlan plan;
  plan.tile_m = tile.m;
  plan.tile_n = tile.n;
  plan.group = static_cast<int32_t>(s.group());
  const bool packs = tile.packs && s.S_q < tile.m && plan.group <= TilePlan::kMaxPack;
  plan.pack = packs ? plan.group : 1;
  static_assert(uint64_t{TilePlan::kMaxPack} * TilePlan::kMaxPack * 255 < uint64_t{1} << 32);
  if (plan.pack > 1) plan.pack_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / plan.pack + 1);
  plan.rows = static_cast<int32_t>(s.S_q * plan.pack);
  plan.q_tiles = static_cast<uint32_t>(ceil_div<int64_t>(plan.rows, tile.m));
  plan.column_blocks = static_cast<uint32_t>(tile.column_blocks);
  plan.heads_per_batch = static_cast<uint32_t>(s.H / plan.pack);
  plan.heads = static_cast<uint32_t>(s.B * plan.heads_per_batch);
  plan.section_heads = section_heads(args, plan);
  const auto kv_tiles = static_cast<int32_t>(ceil_div<int64_t>(s.S_kv, tile.n));
  const int32_t tiles_per_split =
      ceil_div(std::max(kv_tiles, 1), wanted_splits(args, plan, tile, multiprocessors));
  plan.splits = static_cast<uint32_t>(ceil_div(std::max(kv_tiles, 1), tiles_per_split));
  plan.keys_per_split = tiles_per_split * tile.n;
  return plan;
}

}  // namespace online_attention::cuda
