// SPDX-License-Identifier: BSD-3-Clause
// Copies of boxes of a tensor between global and shared memory by the copy engine (TMA). One thread
// issues each. The tensor map is a kernel parameter marked __grid_constant__; shared addresses are
// multiples of 128, of 1024 with the 128-byte swizzle.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace online_attention::cuda::ptx {

// prefetch.tensormap (PTX 8.0, sm_90).
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes (PTX 8.0,
// sm_90). What lies outside the tensor arrives as zeros and counts as bytes too.
__device__ __forceinline__ void tma_load(uint32_t shared_dst, const CUtensorMap& map,
                                         uint32_t barrier, int32_t c0, int32_t c1, int32_t c2,
                                         int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_dst),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes (PTX 8.0,
// sm_90).
__device__ __forceinline__ void tma_load(uint32_t shared_dst, const CUtensorMap& map,
                                         uint32_t barrier, int32_t c0, int32_t c1, int32_t c2,
                                         int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_dst),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group (PTX 8.0, sm_90). What lies outside
// the tensor is not written. Needs fence_async_proxy by whoever wrote the shared memory.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, uint32_t shared_src, int32_t c0,
                                          int32_t c1, int32_t c2, int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
      "[%1];" ::"l"(&map),
      "r"(shared_src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// cp.async.bulk.commit_group (PTX 8.0, sm_90): closes the group of this thread's stores.
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group.read (PTX 8.0, sm_90): until at most kPending groups of this thread's
// stores have still to read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group (PTX 8.0, sm_90): until at most kPending groups of this thread's stores
// have still to be written; it sees those that have been.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// fence.proxy.async.global (PTX 8.0, sm_90): this thread's ordinary accesses to global memory, and
// what they have made visible, come before copies that are issued after it, and the other way
// round.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// fence.proxy.async.shared::cta (PTX 8.0, sm_90): this thread's ordinary accesses to shared memory
// come before accesses by copies and warpgroup products that are issued after it.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace online_attention::cuda::ptx
