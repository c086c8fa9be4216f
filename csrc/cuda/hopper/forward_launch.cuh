// SPDX-License-Identifier: BSD-3-Clause
// The kernel, and the body of launch_forward, for the .cu files that instantiate it.
#pragma once

#include <algorithm>

#include "cuda/hopper/forward.cuh"
#include "cuda/hopper/forward_launch.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda::hopper {

// A kernel's own template arguments must be types and integers, hence not a ForwardConfig.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kForward<kHeadDim>.threads(), 1)
    hopper_forward_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr ForwardConfig kConfig = kForward<kHeadDim>;
  forward_block<Element, kConfig>(call, smem);
}

// One query tile of one head after the other, in the order of TilePlan::locate; rows that see no
// key are left out as far as they fill tiles.
inline void plan_call(const ForwardArgs& args, const ForwardConfig& config, ForwardCall& call) {
  const TileShape tile = {.m = config.tile_m(),
                          .n = config.tile_n,
                          .column_blocks = 1,
                          .blocks_per_sm = 1,
                          .packs = false,
                          .splits = false};
  call.plan = plan_tiles(args, tile, 0);
  const QRange seeing = args.mask.q_range(0, args.mask.s_kv, call.plan.rows);
  call.first_row = seeing.begin;
  call.last_row = seeing.begin + seeing.size();
  call.plan.q_tiles = ceil_div(seeing.size(), config.tile_m());
}

// Fills in a call but `taken`.
inline Status describe_call(const ForwardArgs& args, const ForwardConfig& config,
                            ForwardCall& call) {
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
  } tensors[] = {{args.q, {s.B, s.H, s.S_q, s.D}, kQBoxRows, call.q},
                 {args.k, {s.B, s.H_kv, s.S_kv, s.D}, config.tile_n, call.k},
                 {args.v, {s.B, s.H_kv, s.S_kv, s.D_v}, config.tile_n, call.v},
                 {args.out, {s.B, s.H, s.S_q, s.D_v}, kOutBoxRows, call.out}};
  for (const auto& tensor : tensors) {
    const Status status =
        describe(tensor.view, tensor.sizes, args.dtype, tensor.box_rows, tensor.box);
    if (status != kOk) return status;
  }
  return kOk;
}

template <typename Element, int kHeadDim>
Status launch_forward(const ForwardArgs& args, const Launch& on) {
  constexpr ForwardConfig kConfig = kForward<kHeadDim>;
  ForwardCall call;
  const Status status = describe_call(args, kConfig, call);
  if (status != kOk) return status;
  call.taken = nullptr;
  if (args.mask.is_banded()) {  // tiles differ in length
    call.taken = static_cast<uint32_t*>(on.workspace);
    const cudaError_t error =
        cudaMemsetAsync(call.taken, 0, sizeof(*call.taken), static_cast<cudaStream_t>(on.stream));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  const int64_t tiles = call.plan.tiles();
  if (tiles > TilePlan::kMaxTiles)
    return "the call has more than 2^31 query tiles: split its batch";
  const int64_t blocks = std::clamp<int64_t>(tiles, 1, on.device.multiprocessors);
  return launch(hopper_forward_kernel<Element, kHeadDim>, blocks, kConfig.threads(),
                kConfig.smem_bytes(), on.stream, call);
}

}  // namespace online_attention::cuda::hopper
