// SPDX-License-Identifier: BSD-3-Clause
// A launch of the Hopper kernel, as the device receives it.
#pragma once

#include <cuda.h>

#include "core/problem.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::hopper {

// A [B, H, S, D] tensor for the copy engine. A dimension that is broadcast has size 1 in the map;
// its step, which multiplies the coordinate, is 0.
struct TensorBox {
  CUtensorMap map;
  int32_t step_b = 1, step_h = 1;
};

struct ForwardCall {
  TensorBox q, k, v, out;
  ForwardArgs args;
  TilePlan plan;
  // The rows [0, first_row) and [last_row, S_q) see no key and belong to no tile.
  int32_t first_row, last_row;
  float sign, scale_log2;
  // How many tiles have been taken beyond the first of each block, 0 at the start; nullptr: blocks
  // take turns.
  uint32_t* taken;
};

}  // namespace online_attention::cuda::hopper
