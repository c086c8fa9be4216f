// SPDX-License-Identifier: BSD-3-Clause
// A launch of the Hopper backward kernel, as the device receives it.
#pragma once

#include "cuda/hopper/backward_buffers.h"
#include "cuda/hopper/call.h"

namespace online_attention::cuda::hopper {

struct BackwardCall {
  TensorBox q, k, v, dout, dq, dk, dv;
  BackwardArgs args;
  BackwardPlan plan;
  BackwardBuffers buffers;
  float factor_log2;  // of scores: scale * log2(e)
};

}  // namespace online_attention::cuda::hopper
