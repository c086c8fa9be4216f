// SPDX-License-Identifier: BSD-3-Clause
// How the Hopper backward is cut into key tiles, and what it keeps in the workspace.
#pragma once

#include <algorithm>

#include "cuda/backward_plan.h"
#include "cuda/hopper/backward_config.h"

namespace online_attention::cuda::hopper {

inline constexpr int kCounterStride = 8;

struct BackwardBuffers {
  // For each query row of each head, heads padded to whole tiles: lse in base-2 units, +inf for
  // rows without a sum and for padding; delta (E28). Rows of a tile as term_place has them.
  float* lse2 = nullptr;
  float* delta = nullptr;
  // fp32 sums of dQ before the scale, a tile after the other as dq_place has them.
  float* dq_sums = nullptr;
  // Where key tiles add in order: how many have, for each query tile and each group's part of its
  // dQ. 0 at the start. nullptr: they add in any order, and the sums are 0 at the start.
  int32_t* added = nullptr;
  // Whether the last key tile to add writes dQ; else a kernel behind makes it of the sums.
  bool finished_by_last = false;
  // How many key tiles have been taken; where they add in any order, beyond the first of each
  // block. 0 at the start.
  uint32_t* taken = nullptr;
};

// Of a query tile and a group's part of it, in BackwardBuffers::added: each in a sector of memory
// of its own.
ONLINE_ATTENTION_HD constexpr int64_t counter_place(uint32_t tile, int group) {
  return (int64_t{tile} * BackwardConfig::kGroups + group) * kCounterStride;
}

// The key tiles that add to the dQ of query tile `q_tile`.
ONLINE_ATTENTION_HD IndexRange adders_of(const BackwardArgs& args, const BackwardPlan& plan,
                                         int32_t q_tile) {
  const int64_t end = (int64_t{q_tile} + 1) * plan.tile_m;
  const KvRange keys = args.mask.kv_range(
      q_tile * plan.tile_m, static_cast<int32_t>(end < args.shape.S_q ? end : args.shape.S_q));
  return {keys.begin / plan.tile_n, ceil_div(keys.end, plan.tile_n)};
}

// Whether key tiles add to a dQ in ascending order. Then the first of them stores, so that nobody
// clears the sums, and under a mask the last one writes dQ. For that they wait for each other, so
// beside deterministic calls it is for those that have few key tiles.
inline bool adds_in_order(const BackwardArgs& args, const BackwardPlan& plan) {
  // Measured: docs/hopper_backward.md.
  constexpr uint32_t kFew = 8, kFewOfGroups = 4, kFewMasked = 4, kFewMaskedOfGroups = 32;
  if (args.deterministic) return true;
  const bool grouped = plan.group > 1;
  if (!args.mask.is_banded()) return plan.kv_tiles <= (grouped ? kFewOfGroups : kFew);
  return plan.kv_tiles <= (grouped ? kFewMaskedOfGroups : kFewMasked * 128 / plan.tile_m);
}

// Finishing takes as long as adding. Under a mask each key tile does it for few query tiles;
// without one the last key tile of a head would do it for all of them.
inline bool is_finished_by_last(const BackwardArgs& args, const BackwardPlan& plan) {
  return adds_in_order(args, plan) && args.mask.is_banded();
}

// Blocks go from key tile to key tile, so that the first Q and dO of one come while the one before
// is computed.
inline int64_t blocks_of(const BackwardPlan& plan, int multiprocessors) {
  return std::min<int64_t>(plan.blocks(), multiprocessors);
}

// Which heads are interleaved, so that their blocks run side by side.
//
// Under a mask, whose key tiles differ in length, those that fill the device once: the fewer they
// are, the more of what their blocks share is in the L2 cache. Of few tiles all are, or long ones
// would begin when there is nothing left to do beside them.
//
// Where key tiles add in order, each goes its way a step behind the one before: the more heads, the
// fewer of one head run side by side and have to wait.
inline BackwardPlan plan_blocks(const BackwardArgs& args, const BackwardConfig& config,
                                int multiprocessors) {
  BackwardPlan plan = plan_backward(args, config.tile_m, BackwardConfig::kTileN, multiprocessors);
  const bool banded = args.mask.is_banded(), ordered = adds_in_order(args, plan);
  if (!banded && !ordered) return plan;
  const auto device = static_cast<uint32_t>(multiprocessors);
  constexpr uint32_t kFewRounds = 8, kHeadsMin = 3, kRoundsMax = 4, kTilesOfARound = 8;
  uint32_t heads = ceil_div(device, plan.kv_tiles);
  if (ordered && banded) {
    const uint32_t rounds =
        std::max(plan.kv_tiles / kTilesOfARound, 1u) * static_cast<uint32_t>(plan.tile_m) / 64;
    heads = ceil_div(device * std::min(rounds, kRoundsMax), plan.kv_tiles);
  } else if (ordered) {
    heads = std::max(heads, kHeadsMin);
  }
  const bool few = banded && int64_t{plan.heads} * plan.kv_tiles <= int64_t{kFewRounds} * device;
  plan.section_heads = few ? plan.heads : std::min(heads, plan.heads);
  return plan;
}

}  // namespace online_attention::cuda::hopper
