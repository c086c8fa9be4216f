// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "cuda/hopper/backward_consumer.cuh"
#include "cuda/ptx/setmaxnreg.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, BackwardConfig kConfig>
__device__ __forceinline__ void backward_block(const BackwardCall& call,
                                               unsigned char* smem_base) {
  const BackwardMap<kConfig> smem{ptx::shared_address(smem_base), smem_base};
  if (threadIdx.x == 0) {
    smem.init_barriers();
    ptx::prefetch_tensor_map(call.q.map);
    ptx::prefetch_tensor_map(call.k.map);
    ptx::prefetch_tensor_map(call.v.map);
    ptx::prefetch_tensor_map(call.dout.map);
    ptx::prefetch_tensor_map(call.dk.map);
    ptx::prefetch_tensor_map(call.dv.map);
  }
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128u), 0);
  if (group == 0) {
    ptx::give_registers<BackwardConfig::kProducerRegisters>();
    if (threadIdx.x == 0) BackwardLoader<kConfig>{call, smem}.run_keys();
    if (threadIdx.x == 32) BackwardLoader<kConfig>{call, smem}.run_queries();
  } else {
    ptx::take_registers<BackwardConfig::kConsumerRegisters>();
    BackwardConsumer<Element, kConfig> consumer{call, smem, group - 1};
    consumer.run();
  }
}

}  // namespace online_attention::cuda::hopper
