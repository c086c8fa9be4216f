// SPDX-License-Identifier: BSD-3-Clause
// A launch of the Hopper kernel, as the device receives it.
#pragma once

#include <cuda.h>

#include "core/problem.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::hopper {

// A [B, H, S, D] tensor for the copy engine; of queries H is two dimensions (see describe). One
// that is broadcast has size 1 in the map; its step, which multiplies the coordinate, is 0.
struct TensorBox {
  CUtensorMap map;
  int32_t step_b = 1, step_h = 1;
};

struct ForwardCall {
  TensorBox q, k, v;
  ForwardArgs args;
  TilePlan plan;
  // The queries [0, first_query) and [last_query, S_q) see no key and belong to no tile.
  int32_t first_query, last_query;
  float sign, scale_log2;
  // How many tiles have been taken beyond the first of each block, 0 at the start and again at the
  // end; nullptr: blocks take turns.
  uint32_t* taken;
  SplitBuffers<float> partial;  // where the plan has more than one split
};

}  // namespace online_attention::cuda::hopper
