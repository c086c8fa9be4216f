// SPDX-License-Identifier: BSD-3-Clause
// Barriers for part of a block.
#pragma once

namespace online_attention::cuda::ptx {

// barrier.cta.sync (PTX 6.0, sm_70): waits until `threads` threads, a multiple of 32, have arrived
// at barrier `id` (1 to 15; 0 is __syncthreads), and makes their shared-memory writes visible.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// barrier.cta.red.or.pred (PTX 6.0, sm_70): barrier_sync that returns whether any of the threads
// had a true predicate.
__device__ __forceinline__ bool barrier_or(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{.reg .pred p, q; setp.ne.s32 p, %3, 0;\n"
      "barrier.cta.red.or.pred q, %1, %2, p; selp.s32 %0, 1, 0, q;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any != 0;
}

// barrier.cta.arrive (PTX 6.0, sm_70): counts among the threads of a barrier_sync without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace online_attention::cuda::ptx
