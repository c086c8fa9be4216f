// SPDX-License-Identifier: BSD-3-Clause
// The kernel, and the body of launch_forward, for the .cu files that instantiate it.
#pragma once

#include <algorithm>

#include "cuda/combine.h"
#include "cuda/hopper/forward.cuh"
#include "cuda/hopper/forward_launch.h"
#include "cuda/hopper/forward_plan.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/hopper/tile_counter.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda::hopper {

// A kernel's own template arguments must be types, integers and enumerators, hence not a
// ForwardConfig.
template <typename Element, int kHeadDim, int kValueDim, Calls kCalls>
__global__ void __launch_bounds__(kForward<kHeadDim, kValueDim, kCalls>.threads(), 1)
    hopper_forward_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr ForwardConfig kConfig = kForward<kHeadDim, kValueDim, kCalls>;
  forward_block<Element, kConfig>(call, smem);
}

// Fills in a call but what lies in the workspace.
inline Status describe_call(const ForwardArgs& args, const ForwardConfig& config,
                            const ForwardPlan& plan, ForwardCall& call) {
  const Shape& s = args.shape;
  call.plan = plan.tiles;
  call.first_query = plan.first_query;
  call.last_query = plan.last_query;
  call.args = args;
  call.sign = static_cast<float>(args.scale.sign);
  call.scale_log2 = static_cast<float>(args.scale.log2);
  const Status status = describe_packed(args.q, {s.B, s.H, s.S_q, s.D}, args.dtype, kQBoxRows,
                                        call.plan.pack, call.q);
  if (status != kOk) return status;
  const Status k_status =
      describe(args.k, {s.B, s.H_kv, s.S_kv, s.D}, args.dtype, config.tile_n, call.k);
  if (k_status != kOk) return k_status;
  return describe(args.v, {s.B, s.H_kv, s.S_kv, s.D_v}, args.dtype, config.tile_n, call.v);
}

// Fills in the rest but the counter.
inline void place_workspace(void* workspace, const ForwardPlan& plan, ForwardCall& call) {
  call.taken = nullptr;
  void* behind = static_cast<char*>(workspace) + plan.counter_bytes();
  call.partial = SplitBuffers<float>::in(behind, call.plan, call.args.shape);
}

template <typename Element, int kHeadDim, int kValueDim, Calls kCalls>
Status launch_forward(const ForwardArgs& args, const Launch& on) {
  constexpr ForwardConfig kConfig = kForward<kHeadDim, kValueDim, kCalls>;
  const ForwardPlan plan = plan_forward(args, kConfig, on.device.multiprocessors);
  ForwardCall call;
  const Status status = describe_call(args, kConfig, plan, call);
  if (status != kOk) return status;
  place_workspace(on.workspace, plan, call);
  if (plan.counts) {
    const Status zeroed = zeroed_counter(on.stream, on.workspace, call.taken);
    if (zeroed != kOk) return zeroed;
  }
  const int64_t tiles = call.plan.tiles();
  if (tiles > TilePlan::kMaxTiles)
    return "the call has more than 2^31 query tiles: split its batch";
  const int64_t blocks = std::clamp<int64_t>(tiles, 1, on.device.multiprocessors);
  const Status launched = launch(hopper_forward_kernel<Element, kHeadDim, kValueDim, kCalls>,
                                 blocks, kConfig.threads(), kConfig.smem_bytes(), on.stream, call);
  if (launched != kOk || call.plan.splits == 1) return launched;
  return combine(args, call.plan, call.partial, on.stream);
}

}  // namespace online_attention::cuda::hopper
