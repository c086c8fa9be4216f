// SPDX-License-Identifier: BSD-3-Clause
// How the Hopper backward for wide heads is cut into clusters, and what it keeps in the workspace.
#pragma once

#include <algorithm>

#include "cuda/backward_plan.h"
#include "cuda/hopper/backward_buffers.h"
#include "cuda/hopper/wide_backward_config.h"

namespace online_attention::cuda::hopper {

struct WideBackwardBuffers {
  // For each query row of each head, heads padded to whole tiles: lse in base-2 units, +inf for
  // rows without a sum, 1e38 for padding; delta (E28). Rows of a tile as term_place has them.
  float* lse2 = nullptr;
  float* delta = nullptr;
  // fp32 sums of dQ before the scale, a tile after the other as dq_place has them.
  float* dq_sums = nullptr;
  // Where key tiles add in order: how many clusters have, for each query tile and each block's part
  // of its dQ, see counter_place. 0 at the start. nullptr: they add in any order, and the sums are
  // 0 at the start.
  int32_t* added = nullptr;
  // Then also how many clusters have begun. 0 at the start.
  uint32_t* begun = nullptr;
};

// Whether key tiles add to a dQ in ascending order. Then the first of them stores, so that nobody
// clears the sums, but they wait for each other, so beside deterministic calls it is for those that
// have few key tiles. Under a mask all heads of a group then come to a query tile before the next
// one, which is better than head by head for more of them.
inline bool adds_in_order(const BackwardArgs& args) {
  constexpr int64_t kFewTiles = 4, kFewMasked = 8, kFewOfGroups = 64;  // docs/hopper_backward.md
  const int64_t kv_tiles =
      ceil_div<int64_t>(args.shape.S_kv, int64_t{WideBackwardConfig::kClusterKeys});
  if (args.deterministic) return true;
  if (!args.mask.is_banded()) return kv_tiles <= kFewTiles;
  return kv_tiles <= (args.shape.group() > 1 ? kFewOfGroups : kFewMasked);
}

// Which heads are interleaved, so that their blocks run side by side.
//
// Under a mask, whose key tiles differ in length, those that fill the device once: the fewer they
// are, the more of what their blocks share is in the L2 cache. Of few tiles all are, or long ones
// would begin when there is nothing left to do beside them.
//
// Where key tiles add in order, each goes its way a step behind the one before: the more heads, the
// fewer of one head run side by side and have to wait. Beyond a few there is nothing to gain but
// where all are there at once, and those of a group share much.
inline BackwardPlan plan_wide_blocks(const BackwardArgs& args, bool ordered, int multiprocessors) {
  BackwardPlan plan = plan_backward(args, WideBackwardConfig::tile_m,
                                    WideBackwardConfig::kClusterKeys, multiprocessors);
  const bool banded = args.mask.is_banded();
  if (!banded && !ordered) return plan;
  constexpr int64_t kFewRounds = 8, kAtOnceRounds = 2;
  constexpr uint32_t kHeadsMax = 8, kOfGroupsMax = 4;
  const auto clusters = static_cast<uint32_t>(multiprocessors) / WideBackwardConfig::kBlocks;
  const bool few = plan.blocks() <= kFewRounds * clusters;
  uint32_t heads = ceil_div(ordered && banded ? 2 * clusters : clusters, plan.kv_tiles);
  if (few) heads = plan.heads;
  if (ordered && plan.blocks() > kAtOnceRounds * clusters) {
    heads = std::min(heads, plan.group > 1 ? kOfGroupsMax : kHeadsMax);
  }
  plan.section_heads = std::min(heads, plan.heads);
  return plan;
}

}  // namespace online_attention::cuda::hopper
