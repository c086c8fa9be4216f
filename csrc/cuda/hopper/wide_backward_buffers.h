// SPDX-License-Identifier: BSD-3-Clause
// What the Hopper backward for wide heads keeps in the workspace.
#pragma once

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
  // of its dQ, see counter_place. 0 at the start. nullptr: they add in any order, and the sums are 0
  // at the start.
  int32_t* added = nullptr;
  // Then also how many clusters have begun. 0 at the start.
  uint32_t* begun = nullptr;
};

}  // namespace online_attention::cuda::hopper
