// SPDX-License-Identifier: BSD-3-Clause
// Barriers in shared memory that count arrivals and bytes of asynchronous copies. A phase ends when
// as many threads have arrived as the barrier was made for and all bytes expected have come; phases
// are told apart by their parity, and phase -1 counts as ended. Addresses: see shared_address.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// mbarrier.init.shared::cta.b64 (PTX 7.0, sm_80). By one thread; then fence_mbarrier_init and a
// barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init.release.cluster (PTX 8.0, sm_90): the barriers are seen by asynchronous
// copies too.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.shared::cta.b64 (PTX 7.0, sm_80), with release semantics.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same by the threads for which `arrives` holds, without a branch.
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t barrier, bool arrives) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}

// mbarrier.arrive.expect_tx.shared::cta.b64 (PTX 8.0, sm_90): arrives, and the phase also waits for
// this many bytes.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// mbarrier.test_wait.parity.shared::cta.b64 (PTX 7.1, sm_80): whether the phase of this parity has
// ended. With acquire semantics.
__device__ __forceinline__ bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}

// mbarrier.try_wait.parity.shared::cta.b64 (PTX 7.8, sm_90): whether the phase of this parity has
// ended, after waiting for it for a while. With acquire semantics.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}

}  // namespace online_attention::cuda::ptx
