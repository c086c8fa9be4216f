// SPDX-License-Identifier: BSD-3-Clause
// Barriers for part of a block.
#pragma once

namespace online_attention::cuda::ptx {

// barrier.cta.sync (PTX 6.0, sm_70): waits until `threads` threads, a multiple of 32, have arrived
// at barrier `id` (1 to 15; 0 is __syncthreads), and makes their shared-memory writes visible.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// barrier.cta.arrive (PTX 6.0, sm_70): counts among the threads of a barrier_sync without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace online_attention::cuda::ptx
