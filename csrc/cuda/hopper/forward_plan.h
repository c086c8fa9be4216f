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

  // Whether the tiles taken are counted: those of a masked call differ in length. Where each block
  // has one at most there is nothing to count.
  bool counts = false;

  // The workspace: the counter, then the partial results. A call with neither asks for none, which
  // saves a visit to torch's allocator, a tenth of a small call's host time.
  int64_t counter_bytes() const { return counts ? 256 : 0; }  // what follows is aligned
  int64_t workspace_bytes(const ForwardArgs& args) const {
    return counter_bytes() + SplitBuffers<float>::bytes(tiles, args.shape);
  }
};

ForwardPlan plan_forward(const ForwardArgs& args, const ForwardConfig& config, int multiprocessors);

}  // namespace online_attention::cuda::hopper
