// SPDX-License-Identifier: BSD-3-Clause
// Copies from global to shared memory that bypass registers (sm_80). On sm_75 the same functions
// copy through registers at once, and the waits have nothing to wait for.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// cp.async.{ca,cg}.shared.global with zero fill (PTX 7.0, sm_80), 16 bytes with the hint to fetch
// 128 bytes into L2 (PTX 7.4). Copies kBytes (4, 8 or 16; both
// addresses so aligned) if `valid`, else writes zeros and reads nothing. Visible to the thread
// after cp_async_wait, to others after a barrier behind that.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t shared_dst, const void* global_src, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_dst),
                 "l"(global_src), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_dst), "l"(global_src),
                 "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
#else
  uint32_t words[kBytes / 4] = {};
  if (valid) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words[i] = static_cast<const uint32_t*>(global_src)[i];
  }
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared_dst + 4 * i), "r"(words[i]) : "memory");
  }
#endif
}

// cp.async.commit_group (PTX 7.0, sm_80): closes the group of copies issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// cp.async.wait_group (PTX 7.0, sm_80): until at most kPending of this thread's groups are open.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace online_attention::cuda::ptx
