// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel of the tensor-core runner's backward: an element type and a head-dim bucket.
// Each is instantiated in a .cu of its own.
#pragma once

#include "core/launch.h"
#include "cuda/backward_plan.h"
#include "cuda/portable/backward_config.h"

namespace online_attention::cuda::portable {

// The parts of the workspace. dq_sums and turns lie side by side and start at zero.
struct BackwardBuffers {
  float* delta = nullptr;
  float* lse2 = nullptr;
  float* dq_sums = nullptr;
  int32_t* turns = nullptr;
};

// The gradients, dQ in sums. kModified: of calls with a bias or dropout.
template <typename Element, int kHeadDim, bool kModified>
Status launch_tensor_core_backward(const BackwardArgs& args, const BackwardPlan& plan,
                                   const BackwardBuffers& buffers, SmemClass size,
                                   const Launch& launch);
// dQ from its sums.
template <typename Element, int kHeadDim>
Status launch_store_dq(const BackwardArgs& args, const BackwardPlan& plan,
                       const BackwardBuffers& buffers, SmemClass size, const Launch& launch);

}  // namespace online_attention::cuda::portable
