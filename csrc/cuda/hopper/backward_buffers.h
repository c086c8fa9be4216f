// SPDX-License-Identifier: BSD-3-Clause
// How the Hopper backward is cut into key tiles, and what it keeps in the workspace.
#pragma once

#include "cuda/backward_plan.h"
#include "cuda/hopper/backward_config.h"

namespace online_attention::cuda::hopper {

struct BackwardBuffers {
  // For each query row of each head, heads padded to whole tiles: lse in base-2 units, +inf for
  // rows without a sum and for padding; delta (E28). Rows of a tile as term_place has them.
  float* lse2 = nullptr;
  float* delta = nullptr;
  // fp32 sums of dQ before the scale, a tile after the other as dq_place has them.
  float* dq_sums = nullptr;
  // How many key tiles have been taken beyond the first of each block, 0 at the start; nullptr:
  // blocks take turns.
  uint32_t* taken = nullptr;
};

// Under a mask, whose key tiles differ in length, the heads that fill the device once are
// interleaved: the fewer they are, the more of what their blocks share is in the L2 cache. Of few
// tiles all are, or long ones would begin when there is nothing left to do beside them.
inline BackwardPlan plan_blocks(const BackwardArgs& args, const BackwardConfig& config,
                                int multiprocessors) {
  BackwardPlan plan = plan_backward(args, config.tile_m, BackwardConfig::kTileN, multiprocessors);
  if (args.mask.is_banded()) {
    constexpr int64_t kFewRounds = 8;
    const bool few = int64_t{plan.heads} * plan.kv_tiles <= kFewRounds * multiprocessors;
    const auto filling = ceil_div(static_cast<uint32_t>(multiprocessors), plan.kv_tiles);
    plan.section_heads = few || filling >= plan.heads ? plan.heads : filling;
  }
  return plan;
}

}  // namespace online_attention::cuda::hopper
