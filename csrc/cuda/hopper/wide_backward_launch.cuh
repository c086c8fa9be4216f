// SPDX-License-Identifier: BSD-3-Clause
// The kernel, and the body of launch_wide_backward, for the .cu files that instantiate it.
#pragma once

#include "cuda/hopper/tensor_map.h"
#include "cuda/hopper/wide_backward.cuh"
#include "cuda/hopper/wide_backward_launch.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda::hopper {

// A kernel's own template arguments must be types and integers, hence not a WideBackwardConfig.
template <typename Element, int kHeadDim, int kValueDim, bool kMasked>
__global__ void __cluster_dims__(WideBackwardConfig::kBlocks, 1, 1)
    __launch_bounds__(WideBackwardConfig::kThreads, 1)
        hopper_wide_backward_kernel(const __grid_constant__ WideBackwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr WideBackwardConfig kConfig = kWideBackward<kHeadDim, kValueDim, kMasked>;
  wide_backward_block<Element, kConfig>(call, smem);
}

inline Status describe_call(const BackwardArgs& args, const BackwardPlan& plan,
                            const WideBackwardBuffers& buffers, WideBackwardCall& call) {
  const Shape& s = args.shape;
  call.args = args;
  call.plan = plan;
  call.buffers = buffers;
  call.factor_log2 = static_cast<float>(args.scale.sign * args.scale.log2);
  const struct {
    const View& view;
    TensorSizes sizes;
    int box_rows;
    TensorBox& box;
  } tensors[] = {{args.q, {s.B, s.H, s.S_q, s.D}, plan.tile_m, call.q},
                 {args.dout, {s.B, s.H, s.S_q, s.D_v}, plan.tile_m, call.dout},
                 {args.k, {s.B, s.H_kv, s.S_kv, s.D}, WideBackwardConfig::kTileN, call.k},
                 {args.v, {s.B, s.H_kv, s.S_kv, s.D_v}, WideBackwardConfig::kTileN, call.v},
                 {args.dk, {s.B, s.H_kv, s.S_kv, s.D}, kGradientBoxRows, call.dk},
                 {args.dv, {s.B, s.H_kv, s.S_kv, s.D_v}, kGradientBoxRows, call.dv}};
  for (const auto& tensor : tensors) {
    if (tensor.view.data == nullptr) continue;  // not asked for
    const Status status =
        describe(tensor.view, tensor.sizes, args.dtype, tensor.box_rows, tensor.box);
    if (status != kOk) return status;
  }
  return kOk;
}

template <typename Element, int kHeadDim, int kValueDim, bool kMasked>
Status launch_wide_backward(const BackwardArgs& args, const BackwardPlan& plan,
                            const WideBackwardBuffers& buffers, const Launch& on) {
  constexpr WideBackwardConfig kConfig = kWideBackward<kHeadDim, kValueDim, kMasked>;
  WideBackwardCall call;
  const Status status = describe_call(args, plan, buffers, call);
  if (status != kOk) return status;
  if (plan.blocks() > TilePlan::kMaxTiles)
    return "the call has more than 2^31 key tiles: split its batch";
  return launch(hopper_wide_backward_kernel<Element, kHeadDim, kValueDim, kMasked>,
                plan.blocks() * WideBackwardConfig::kBlocks, WideBackwardConfig::kThreads,
                kConfig.smem_bytes(), on.stream, call);
}

}  // namespace online_attention::cuda::hopper
