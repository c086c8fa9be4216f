// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel: an element type and a head-dim bucket. Each is instantiated in a .cu of its
// own.
#pragma once

#include "core/launch.h"
#include "cuda/hopper/backward_call.h"

namespace online_attention::cuda::hopper {

// dK, dV and the sums of dQ, from the terms of the rows.
template <typename Element, int kHeadDim>
Status launch_backward(const BackwardArgs& args, const BackwardPlan& plan,
                       const BackwardBuffers& buffers, const Launch& launch);

}  // namespace online_attention::cuda::hopper
