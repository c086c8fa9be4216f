// SPDX-License-Identifier: BSD-3-Clause
// Blocks of a cluster, which reach into each other's shared memory.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// mapa.shared::cluster.u32 (PTX 7.8, sm_90): where the block of this rank has what this one has at
// `address`.
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// ld.shared::cluster.u32 (PTX 7.8, sm_90): from any block of the cluster, see address_in.
__device__ __forceinline__ uint32_t load_in_cluster(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

// barrier.cluster.arrive, barrier.cluster.wait (PTX 7.8, sm_90): all threads of all blocks.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// mbarrier.arrive.shared::cluster.b64 (PTX 8.0, sm_90): at a barrier of any block of the cluster,
// see address_in. Says that this thread has read what it read before. What it wrote is not made
// visible to other blocks by it: for that, arrivals wait until all earlier accesses to memory have
// ended.
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 (PTX 8.0, sm_90): as mbarrier_try_wait,
// where threads of other blocks arrive too.
__device__ __forceinline__ bool mbarrier_try_wait_in_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}

// cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes (PTX 8.0, sm_90): copies
// to another block, at whose barrier the bytes arrive. Needs fence_async_proxy by whoever wrote.
__device__ __forceinline__ void bulk_copy_to(uint32_t cluster_dst, uint32_t shared_src,
                                             uint32_t bytes, uint32_t cluster_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(cluster_dst),
      "r"(shared_src), "r"(bytes), "r"(cluster_barrier)
      : "memory");
}

}  // namespace online_attention::cuda::ptx
