// SPDX-License-Identifier: BSD-3-Clause
// Sums and signals through global memory.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// red.relaxed.gpu.global.add.v4.f32 (PTX 8.1, sm_90): adds four floats to 16-byte aligned memory,
// each by itself; four scalar red.add below sm_90. Subnormals count as 0.
__device__ __forceinline__ void reduce_add(float* address, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(address), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address + i), "f"(x[i])
                 : "memory");
  }
#endif
}

// st.global.v4.f32, to 16-byte aligned memory.
__device__ __forceinline__ void store(float* address, const float (&x)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

// st.global.v4.b32, st.global.f32: by the threads for which `stores` holds, without a branch.
__device__ __forceinline__ void store_if(void* address, const uint32_t (&x)[4], bool stores) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0;\n"
      "@p st.global.v4.b32 [%0], {%1,%2,%3,%4};}" ::"l"(address),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(static_cast<int>(stores))
      : "memory");
}
__device__ __forceinline__ void store_if(float* address, float x, bool stores) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %2, 0;\n"
      "@p st.global.f32 [%0], %1;}" ::"l"(address),
      "f"(x), "r"(static_cast<int>(stores))
      : "memory");
}

// ld.acquire.gpu.b32 (PTX 6.0, sm_70): what the releasing thread saw before its release_add is seen
// after this.
__device__ __forceinline__ int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// red.release.gpu.add.s32 (PTX 6.0, sm_70).
__device__ __forceinline__ void release_add(int32_t* address, int32_t x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

}  // namespace online_attention::cuda::ptx
