// SPDX-License-Identifier: BSD-3-Clause
// Matrix products of a warpgroup (4 warps, the first warp's index a multiple of 4) that run while
// the threads go on. The order of one product:
//     wgmma_fence; wgmma_ss or wgmma_rs, once for each 16 columns of A; wgmma_commit; wgmma_wait
// Until the wait, the accumulators and A's registers must be neither read nor written; `held` tells
// the compiler so, which sees only instructions that name registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace online_attention::cuda::ptx {

// The element type as the instruction's name has it.
template <typename Element>
struct WgmmaType;
template <>
struct WgmmaType<__half> {
  static constexpr const char name[] = ".f16";
};
template <>
struct WgmmaType<__nv_bfloat16> {
  static constexpr const char name[] = ".bf16";
};

// Along which of its dimensions an operand's elements lie side by side: the one that is summed over
// (k), so that A's rows and B's columns are rows of the tile, or the other (mn).
enum class Major { k, mn };

// wgmma.fence.sync.aligned (PTX 8.0, sm_90a): orders this warpgroup's register accesses before the
// products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group.sync.aligned (PTX 8.0, sm_90a): closes the group of products issued so far.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group.sync.aligned (PTX 8.0, sm_90a): until at most kPending of this warp's groups are
// running. Other warps of the warpgroup may be behind.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction. What uses these registers stays on its side of this point.
template <int kCount>
__device__ __forceinline__ void held(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i]));
}
template <int kCount>
__device__ __forceinline__ void held(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i]));
}

}  // namespace online_attention::cuda::ptx
