// SPDX-License-Identifier: BSD-3-Clause
// How a forward call is cut into tiles, and what it needs in the workspace.
#pragma once

#include "cuda/hopper/config.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::hopper {

struct ForwardPlan {
  TilePlan tiles;  // of the queries below
  // The queries [0, first_query) and [last_query, S_q) see no key and belong to no tile.
  int32_t first_query = 0, last_query = 0;

  // Masked calls count the tiles taken; full ones have tiles of one length.
  static bool counts(const ForwardArgs& args) { return args.mask.is_banded(); }

  // The workspace: the counter, then the partial results. None where a call has neither: asking
  // torch's allocator takes host time.
  static int64_t counter_bytes(const ForwardArgs& args) {
    return counts(args) ? 256 : 0;  // so that what follows is aligned
  }
  int64_t workspace_bytes(const ForwardArgs& args) const {
    return counter_bytes(args) + SplitBuffers<float>::bytes(tiles, args.shape);
  }
};

ForwardPlan plan_forward(const ForwardArgs& args, const ForwardConfig& config, int multiprocessors);

}  // namespace online_attention::cuda::hopper
