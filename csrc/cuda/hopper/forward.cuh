// SPDX-License-Identifier: BSD-3-Clause
// Forward attention on Hopper (FlashAttention-3, section 3). docs/hopper_forward.md has the
// schedule and what was measured.
//
// One block for each SM goes from query tile to query tile (64 rows for each consumer). Its
// warpgroups:
//   0        producer. Warp 0: one thread walks the tiles and starts every copy (Loader).
//            Warps 1 to 3 look through values that a mask cuts (inspect_values).
//   1 ..     consumers: scores, softmax and outputs of their own rows, in registers (Consumer).
//
// Shared memory: q_stages query tiles, stages tiles of keys, stages of values, each in boxes of 64
// columns (128 bytes a row, swizzled); barriers; a Tile for each query tile and two more, because
// outputs are stored after the queries have been given back, and chained ones after those of the
// next query tile, if that has but one key tile.
//
// Barriers (mbarrier, one for each stage):
//   q_full     loader, and its bytes     -> consumers, inspectors: the query tile and its Tile
//   q_empty    every consumer warp after its last S = Q K^T, every inspector -> loader
//   k_full     loader, and its bytes     -> consumers
//   k_empty    every consumer warp, after its S = Q K^T -> loader
//   v_full     loader, and its bytes; for values that a mask cuts the inspectors -> consumers
//   v_landed   loader, and its bytes; only for those     -> inspectors
//   v_empty    every consumer warp, after its O += P V   -> loader
// Named: kInspectorBarrier (config.h).
//
// Registers, of 168 a thread at the start with two consumers (128 with three): 232 (160) a
// consumer, of which S takes tile_n / 2, P tile_n / 4 and O value_dim / 2; 40 (32) a producer.
#pragma once

#include "cuda/hopper/consumer.cuh"
#include "cuda/hopper/producer.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, ForwardConfig kConfig>
__device__ __forceinline__ void forward_block(const ForwardCall& call, unsigned char* smem_base) {
  const SharedMap<kConfig> smem{ptx::shared_address(smem_base), smem_base};
  if (threadIdx.x == 0) {
    smem.init_barriers();
    ptx::prefetch_tensor_map(call.q.map);
    ptx::prefetch_tensor_map(call.k.map);
    ptx::prefetch_tensor_map(call.v.map);
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128u), 0);
  if (group == 0) {
    ptx::give_registers<kConfig.producer_registers()>();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32u), 0);
    if (warp == 0) {
      if (threadIdx.x == 0) Loader<kConfig>{call, smem}.run();
    } else {
      inspect_values<Element, kConfig>(call, smem, warp - 1);
    }
  } else {
    ptx::take_registers<kConfig.consumer_registers()>();
    Consumer<Element, kConfig> consumer{call, smem, group - 1};
    consumer.run();
  }
}

}  // namespace online_attention::cuda::hopper
