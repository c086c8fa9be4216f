// SPDX-License-Identifier: BSD-3-Clause
// Copies of contiguous bytes between global and shared memory by the copy engine. One thread issues
// each; addresses and sizes are multiples of 16.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes (PTX 8.0, sm_90).
__device__ __forceinline__ void bulk_load(uint32_t shared_dst, const void* global_src,
                                          uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_dst),
      "l"(global_src), "r"(bytes), "r"(barrier)
      : "memory");
}

// cp.async.bulk.global.shared::cta.bulk_group (PTX 8.0, sm_90). Belongs to the groups of
// tma_store_commit. Needs fence_async_proxy by whoever wrote the shared memory.
__device__ __forceinline__ void bulk_store(void* global_dst, uint32_t shared_src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global_dst),
               "r"(shared_src), "r"(bytes)
               : "memory");
}

// cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 (PTX 8.0, sm_90): adds floats to
// memory, each by itself. Belongs to the groups of tma_store_commit. Needs fence_async_proxy by
// whoever wrote the shared memory.
__device__ __forceinline__ void bulk_reduce_add(float* global_dst, uint32_t shared_src,
                                                uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   global_dst),
               "r"(shared_src), "r"(bytes)
               : "memory");
}

}  // namespace online_attention::cuda::ptx
