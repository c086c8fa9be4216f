// SPDX-License-Identifier: BSD-3-Clause
// The kernel and the body of its launch, for the .cu files that instantiate it.
#pragma once

#include <algorithm>

#include "cuda/hopper/forward.cuh"
#include "cuda/hopper/tensor_map.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, int kHeadDim, int kValueDim, int kTileN, int kConsumers, int kStages,
          int kQStages, bool kTakeTurns>
__global__ void __launch_bounds__(128 * (kConsumers + 1), 1)
    forward_kernel(const __grid_constant__ ForwardCall call) {
  constexpr ForwardConfig kConfig = {kHeadDim, kValueDim, kTileN, kConsumers, kStages, kQStages, kTakeTurns};
  extern __shared__ __align__(1024) unsigned char smem[];
  forward<Element, kConfig>(call, smem);
}

// One query tile of one head for each block, in the order of TilePlan::locate; rows that see no key
// are left out, whole or by tiles.
inline void plan_call(const ForwardArgs& args, const ForwardConfig& config, ForwardCall& call) {
  const TileShape tile = {.m = config.tile_m(), .n = config.tile_n, .column_blocks = 1, .blocks_per_sm = 1, .packs = false, .splits = false};
  call.plan = plan_tiles(args, tile, 0);
  const QRange seeing = args.mask.q_range(0, args.mask.s_kv, call.plan.rows);
  call.first_row = seeing.begin;
  call.last_row = seeing.begin + seeing.size();
  call.plan.q_tiles = ceil_div(seeing.size(), config.tile_m());
}

// Fills in a call but `taken`.
inline Status describe_call(const ForwardArgs& args, const ForwardConfig& config, ForwardCall& call) {
  const Shape& s = args.shape;
  plan_call(args, config, call);
  call.args = args;
  call.sign = static_cast<float>(args.scale.sign);
  call.scale_log2 = static_cast<float>(args.scale.log2);
  const struct {
    const View& view;
    TensorSizes sizes;
    int box_rows;
    TensorBox& box;
  } tensors[] = {{args.q, {s.B, s.H, s.S_q, s.D}, 64, call.q},
                 {args.k, {s.B, s.H_kv, s.S_kv, s.D}, config.tile_n, call.k},
                 {args.v, {s.B, s.H_kv, s.S_kv, s.D_v}, config.tile_n, call.v},
                 {args.out, {s.B, s.H, s.S_q, s.D_v}, 16, call.out}};
  for (const auto& tensor : tensors) {
    const Status status =
        describe(tensor.view, tensor.sizes, args.dtype, tensor.box_rows, tensor.box);
    if (status != kOk) return status;
  }
  return kOk;
}

}  // namespace online_attention::cuda::hopper
