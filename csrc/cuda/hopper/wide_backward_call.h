// SPDX-License-Identifier: BSD-3-Clause
// A launch of the Hopper backward kernel for wide heads, as the device receives it.
#pragma once

#include "cuda/hopper/call.h"
#include "cuda/hopper/wide_backward_buffers.h"

namespace online_attention::cuda::hopper {

struct WideBackwardCall {
  TensorBox q, k, v, dout, dk, dv;
  BackwardArgs args;
  BackwardPlan plan;
  WideBackwardBuffers buffers;
  float factor_log2;  // of scores: scale * log2(e)
};

}  // namespace online_attention::cuda::hopper
