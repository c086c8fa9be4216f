// SPDX-License-Identifier: BSD-3-Clause
// Backward attention on Hopper (FlashAttention-3, section 3.3 and appendix B.1): five products in
// one pass. docs/hopper_backward.md has the schedule and what was measured.
//
// A block goes from key tile to key tile (128 keys of one key and value head) and steps through the
// query tiles that see its keys, of every query head of the group. Its warpgroups:
//   0      producer. One thread of warp 0 brings K and V, one of warp 1 chooses key tiles, brings
//          Q, dO and the terms of their rows (BackwardLoader). Warps 2 and 3 add the dQ of the two
//          consumers to the sums in memory and write it when it is complete (DqWriter).
//   1, 2   consumers, 64 keys each: S^T, dP^T, P^T and dS^T in registers, from where they go into
//          dV and dK; dS through shared memory into dQ (BackwardConsumer).
//
// Shared memory: K, V; two stages each of Q, dO, dS; dQ of a step and sums of dQ, for each warp;
// the terms of the rows of two query tiles; marks of keys; barriers; KeyTiles, DqTasks and
// LoadedSteps. Tiles are boxes of 64 columns (128 bytes a row, swizzled).
//
// Barriers (mbarrier; those of queries and dS one for each stage):
//   tile_full   loader of queries                  -> loader of keys, DqWriters: the next KeyTile
//   tile_empty  loader of keys, DqWriters          -> loader of queries: room for one
//   k_full      loader, and its bytes              -> consumers: K, and the KeyTile
//   v_full      loader, and its bytes              -> consumers
//   kv_empty    every consumer warp, after the key tile's last dQ -> loader
//   q_full      loader, and its bytes              -> consumers: Q, lse and the LoadedStep
//   q_empty     every consumer warp, after its dK += dS^T Q   -> loader
//   dout_full   loader, and its bytes              -> consumers: dO, delta, which step is next
//   dout_empty  every consumer warp, after its dV += P^T dO   -> loader
//   ds_full     every consumer warp, its part of dS is there  -> consumers
//   ds_empty    every consumer warp, after its dQ = dS K      -> consumers
//   dq_full     the warps of a group, their parts of dQ are there -> DqWriter
//   dq_empty    DqWriter, dQ has been read         -> consumers
//   sums_full   DqWriter, and the bytes of the sums -> DqWriter
// Named (backward_config.h): kConsumersBarrier, of both consumers; kStepBarrier, a consumer's turn.
//
// Registers, of 168 a thread at the start: 232 or 240 a consumer, of which S and dP take tile_m / 2
// each, P and dS, rounded, tile_m / 4 each, dK and dV head_dim / 2 each, V, where it is held,
// head_dim / 4; 40 or 24 a producer.
#pragma once

#include "cuda/hopper/backward_consumer.cuh"
#include "cuda/hopper/backward_dq.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, BackwardConfig kConfig>
__device__ __forceinline__ void backward_block(const BackwardCall& call, unsigned char* smem_base) {
  const BackwardMap<kConfig> smem{ptx::shared_address(smem_base), smem_base};
  if (threadIdx.x == 0) {
    smem.init_barriers();
    ptx::prefetch_tensor_map(call.q.map);
    ptx::prefetch_tensor_map(call.k.map);
    ptx::prefetch_tensor_map(call.v.map);
    ptx::prefetch_tensor_map(call.dout.map);
    ptx::prefetch_tensor_map(call.dq.map);
    ptx::prefetch_tensor_map(call.dk.map);
    ptx::prefetch_tensor_map(call.dv.map);
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128u), 0);
  if (group == 0) {
    ptx::give_registers<kConfig.producer_registers()>();
    if (threadIdx.x == 0) BackwardLoader<kConfig>{call, smem}.run_keys();
    if (threadIdx.x == 32) BackwardLoader<kConfig>{call, smem}.run_queries();
    if (threadIdx.x >= 64) DqWriter<Element, kConfig>{call, smem}.run();
  } else {
    ptx::take_registers<kConfig.consumer_registers()>();
    BackwardConsumer<Element, kConfig> consumer{call, smem, group - 1};
    consumer.run();
  }
}

}  // namespace online_attention::cuda::hopper
