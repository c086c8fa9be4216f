// SPDX-License-Identifier: BSD-3-Clause
// The kernel, and the body of launch_wide_backward, for the .cu files that instantiate it.
#pragma once

#include "cuda/hopper/backward_launch.cuh"
#include "cuda/hopper/wide_backward.cuh"
#include "cuda/hopper/wide_backward_launch.h"

namespace online_attention::cuda::hopper {

// A kernel's own template arguments must be types and integers, hence not a WideBackwardConfig.
template <typename Element, int kHeadDim, int kValueDim, bool kMasked>
__global__ void __launch_bounds__(WideBackwardConfig::kThreads, 1)
    hopper_wide_backward_kernel(const __grid_constant__ BackwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr WideBackwardConfig kConfig = kWideBackward<kHeadDim, kValueDim, kMasked>;
  wide_backward_block<Element, kConfig>(call, smem);
}

template <typename Element, int kHeadDim, int kValueDim, bool kMasked>
Status launch_wide_backward(const BackwardArgs& args, const BackwardPlan& plan,
                            const BackwardBuffers& buffers, const Launch& on) {
  constexpr WideBackwardConfig kConfig = kWideBackward<kHeadDim, kValueDim, kMasked>;
  BackwardCall call;
  const Status status = describe_call(args, plan, buffers, call);
  if (status != kOk) return status;
  if (plan.blocks() > TilePlan::kMaxTiles)
    return "the call has more than 2^31 key tiles: split its batch";
  return launch(hopper_wide_backward_kernel<Element, kHeadDim, kValueDim, kMasked>, plan.blocks(),
                WideBackwardConfig::kThreads, kConfig.smem_bytes(), on.stream, call);
}

}  // namespace online_attention::cuda::hopper
