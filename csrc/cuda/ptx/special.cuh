// SPDX-License-Identifier: BSD-3-Clause
// Special registers.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// %ctaid.x, read anew at every call: blockIdx.x, or what was computed from it, the compiler would
// keep in registers from the first use to the last.
__device__ __forceinline__ uint32_t block_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// %tid.x, read anew at every call, for the same reason.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

}  // namespace online_attention::cuda::ptx
