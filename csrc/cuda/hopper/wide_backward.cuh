// SPDX-License-Identifier: BSD-3-Clause
// Backward attention on Hopper for wide heads.
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
  if (threadIdx.x == 0) {
    smem.init_barriers();
    set_key_tile(smem.tile(), call);
    ptx::prefetch_tensor_map(call.q.map);
    ptx::prefetch_tensor_map(call.k.map);
    ptx::prefetch_tensor_map(call.v.map);
    ptx::prefetch_tensor_map(call.dout.map);
  }
  ptx::cluster_sync();  // of the block too
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128u), 0);
  if (group == 0) {
    ptx::give_registers<WideBackwardConfig::kProducerRegisters>();
    if (threadIdx.x == 0) WideBackwardLoader<kConfig>{call, smem}.run_queries();
    if (threadIdx.x == 32) WideBackwardLoader<kConfig>{call, smem}.run_outputs();
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
  ptx::cluster_sync();  // a block that is gone can neither be written to nor signalled
}

}  // namespace online_attention::cuda::hopper
