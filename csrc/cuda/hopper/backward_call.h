// SPDX-License-Identifier: BSD-3-Clause
// A launch of the Hopper backward kernel, as the device receives it.
#pragma once

#include "cuda/backward_plan.h"
#include "cuda/hopper/call.h"

namespace online_attention::cuda::hopper {

// In the workspace.
struct BackwardBuffers {
  // For each query row of each head, heads padded to whole tiles: lse in base-2 units, +inf for
  // rows without a sum and for padding; delta (E28). Rows of a tile as term_place has them.
  float* lse2 = nullptr;
  float* delta = nullptr;
  // fp32 sums of dQ before the scale, a tile after the other as dq_place has them.
  float* dq_sums = nullptr;
};

struct BackwardCall {
  TensorBox q, k, v, dout, dk, dv;
  BackwardArgs args;
  BackwardPlan plan;
  BackwardBuffers buffers;
  float factor_log2;  // of scores: scale * log2(e)
};

}  // namespace online_attention::cuda::hopper
