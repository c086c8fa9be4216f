// SPDX-License-Identifier: BSD-3-Clause
// The kernel, and the body of launch_backward, for the .cu files that instantiate it.
#pragma once

#include <algorithm>

#include "cuda/hopper/backward.cuh"
#include "cuda/hopper/backward_launch.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda::hopper {

// A kernel's own template arguments must be types and integers, hence not a BackwardConfig.
template <typename Element, int kHeadDim, bool kMasked>
__global__ void __launch_bounds__(BackwardConfig::kThreads, 1)
    hopper_backward_kernel(const __grid_constant__ BackwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr BackwardConfig kConfig = kBackward<kHeadDim, kMasked>;
  backward_block<Element, kConfig>(call, smem);
}

inline Status describe_call(const BackwardArgs& args, const BackwardPlan& plan,
                            const BackwardConfig& config, const BackwardBuffers& buffers,
                            BackwardCall& call) {
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
    int columns = BackwardConfig::kColumns;
  } tensors[] = {{args.q, {s.B, s.H, s.S_q, s.D}, config.tile_m, call.q},
                 {args.dout, {s.B, s.H, s.S_q, s.D_v}, config.tile_m, call.dout},
                 {args.k, {s.B, s.H_kv, s.S_kv, s.D}, BackwardConfig::kTileN, call.k},
                 {args.v, {s.B, s.H_kv, s.S_kv, s.D_v}, BackwardConfig::kTileN, call.v},
                 {args.dq, {s.B, s.H, s.S_q, s.D}, config.dq_queries(), call.dq, kDqColumns},
                 {args.dk, {s.B, s.H_kv, s.S_kv, s.D}, kGradientBoxRows, call.dk},
                 {args.dv, {s.B, s.H_kv, s.S_kv, s.D_v}, kGradientBoxRows, call.dv}};
  for (const auto& tensor : tensors) {
    if (tensor.view.data == nullptr) continue;  // not asked for
    const Status status = describe(tensor.view, tensor.sizes, args.dtype, tensor.box_rows,
                                   tensor.box, tensor.columns);
    if (status != kOk) return status;
  }
  return kOk;
}

template <typename Element, int kHeadDim, bool kMasked>
Status launch_backward(const BackwardArgs& args, const BackwardPlan& plan,
                       const BackwardBuffers& buffers, const Launch& on) {
  constexpr BackwardConfig kConfig = kBackward<kHeadDim, kMasked>;
  BackwardCall call;
  const Status status = describe_call(args, plan, kConfig, buffers, call);
  if (status != kOk) return status;
  if (plan.blocks() > TilePlan::kMaxTiles)
    return "the call has more than 2^31 key tiles: split its batch";
  return launch(hopper_backward_kernel<Element, kHeadDim, kMasked>,
                blocks_of(plan, on.device.multiprocessors), BackwardConfig::kThreads,
                kConfig.smem_bytes(), on.stream, call);
}

}  // namespace online_attention::cuda::hopper
