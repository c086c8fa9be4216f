// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel: an element type, a bucket of head dims, and whether the call has a mask.
// Those of one type and bucket are instantiated in a .cu of their own.
#pragma once

#include "core/launch.h"
#include "cuda/hopper/wide_backward_buffers.h"

namespace online_attention::cuda::hopper {

// dK, dV and the sums of dQ, from the terms of the rows.
template <typename Element, int kHeadDim, int kValueDim, bool kMasked>
Status launch_wide_backward(const BackwardArgs& args, const BackwardPlan& plan,
                            const WideBackwardBuffers& buffers, const Launch& launch);

}  // namespace online_attention::cuda::hopper
