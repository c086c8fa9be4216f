// SPDX-License-Identifier: BSD-3-Clause
// Backward attention on Hopper for wide heads: D and D_v up to 256. docs/hopper_backward.md has the
// schedule and what was measured.
//
// A block has 64 keys of one key and value head and steps through the tiles of 64 queries that see
// keys of its cluster, of every query head of the group. Two blocks of neighbouring keys make a
// cluster: each computes dQ of half of the columns from the dS of both. Its warpgroups:
//   0  producer. One thread of warp 0 brings K and Q, one of warp 1 V and dO, one of warp 2 sends
//      dS to the other block, and where key tiles add to dQ in order, one of warp 3 passes the turn
//      on (WideBackwardLoader).
//   1  S^T, P^T, dV += P^T dO (WideBackwardValues)
//   2  dP^T, dS^T, dK += dS^T Q (WideBackwardKeys)
//   3  dQ = dS K, added to sums in memory (WideBackwardQueries)
// P goes from 1 to 2 through shared memory, and dS, in the same place, from 2 to both blocks' 3.
//
// Shared memory: K, V; half of the columns of the other block's K; stages of Q and dO; tiles of P
// or dS; of the other block's dS; the terms of the rows; marks of keys; barriers; the KeyTile.
// Tiles are boxes of 64 columns (128 bytes a row, swizzled).
//
// Barriers (mbarrier; all but the first two and last two one for each stage):
//   k_full         loader of keys, and the bytes              -> 1, 2, 3: K of both blocks
//   v_full         loader of values, and its bytes            -> 2
//   q_full         loader of keys, and its bytes              -> 1, 2: Q and lse
//   q_empty        warps of 1 after S^T, of 2 after dK        -> loader
//   dout_full      loader of values, and its bytes            -> 1, 2: dO and delta
//   dout_empty     warps of 1 after dV, of 2 after dP^T       -> loader
//   p_full         a warp of 1, its part of P is there        -> the warp of 2 of the same number
//   ds_full        warps of 2, their parts of dS are there    -> 3, and who sends it
//   other_ds_full  who sends, and the bytes of the other's dS -> 3
//   pairs_empty    warps of both blocks' 3, after dQ          -> 1
//   added_full     warps of 3, what they add is on its way    -> who passes the turn on
//   added_empty    who passes the turn on, seen               -> 3
// Before they store, 1 waits for dout_empty and 2 for q_empty of the last step: dV and dK leave
// through its dO and Q. Named: kConsumersBarrier, of 1 and 2, where a mask asks for more than the
// products; kKeysBarrier, of 2, before dS takes the place of P. The cluster's barrier comes first,
// when the others are there, and last, before a block may vanish.
//
// Registers, of 128 a thread at the start: kWideBackward has what each warpgroup settles for. dV
// and dK take up to 128, S and dP 32, P and dS, rounded, 16, dQ 64; the compiler keeps 24 for
// itself.
//
// Key tiles of clusters add to dQ in any order, to sums that are 0 at the start. Or, in
// deterministic calls, in ascending order: then of those that see a query tile the first one
// stores, and each waits for the one before. Which one a cluster has is its number among those that
// have begun, so it waits only for clusters that run or have ended: nothing hangs, in whatever
// order they begin and however few there is room for.
#pragma once

#include "cuda/hopper/wide_backward_keys.cuh"
#include "cuda/hopper/wide_backward_queries.cuh"
#include "cuda/hopper/wide_backward_values.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, WideBackwardConfig kConfig>
__device__ __forceinline__ void wide_backward_block(const WideBackwardCall& call,
                                                    unsigned char* smem_base) {
  const WideBackwardMap<kConfig> smem{ptx::shared_address(smem_base), smem_base};
  const bool ordered = call.buffers.added != nullptr;
  const uint32_t cluster = blockIdx.x / WideBackwardConfig::kBlocks;
  if (threadIdx.x == 0) {
    smem.init_barriers();
    if (!ordered) {
      set_key_tile<kConfig.masked>(smem.tile(), call, cluster);
    } else if (cluster_rank() == 0) {
      smem.tile().end = atomicAdd(call.buffers.begun, 1u);  // for both blocks
    }
    ptx::prefetch_tensor_map(call.q.map);
    ptx::prefetch_tensor_map(call.k.map);
    ptx::prefetch_tensor_map(call.v.map);
    ptx::prefetch_tensor_map(call.dout.map);
  }
  __syncthreads();
  ptx::cluster_sync();
  if (ordered) {
    if (threadIdx.x == 0) {
      const uint32_t begun = ptx::load_in_cluster(ptx::address_in(smem.tile_end(), 0));
      set_key_tile<kConfig.masked>(smem.tile(), call, begun);
    }
    __syncthreads();
  }
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128u), 0);
  if (group == 0) {
    ptx::give_registers<WideBackwardConfig::kProducerRegisters>();
    if (threadIdx.x == 0) WideBackwardLoader<kConfig>{call, smem}.run_queries();
    if (threadIdx.x == 32) WideBackwardLoader<kConfig>{call, smem}.run_outputs();
    if (threadIdx.x == 64) WideBackwardLoader<kConfig>{call, smem}.run_exchange();
    if (threadIdx.x == 96 && ordered) WideBackwardLoader<kConfig>{call, smem}.run_turns();
  } else if (group == 1) {
    ptx::take_registers<kConfig.dv_registers>();
    WideBackwardValues<Element, kConfig>{call, smem}.run();
  } else if (group == 2) {
    ptx::take_registers<kConfig.dk_registers>();
    WideBackwardKeys<Element, kConfig>{call, smem}.run();
  } else {
    ptx::give_registers<kConfig.dq_registers>();
    WideBackwardQueries<Element, kConfig>{{}, call, smem}.run();
  }
  __syncthreads();
  ptx::cluster_sync();  // a block that is gone can neither be written to nor signalled
}

}  // namespace online_attention::cuda::hopper
