// SPDX-License-Identifier: BSD-3-Clause
// Forward attention on Hopper (FlashAttention-3, section 3).
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
    ptx::prefetch_tensor_map(call.out.map);
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
