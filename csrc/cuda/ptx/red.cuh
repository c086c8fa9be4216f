// SPDX-License-Identifier: BSD-3-Clause
// Additions to global memory that return nothing.
#pragma once

namespace online_attention::cuda::ptx {

// red.global.add.v4.f32 (PTX 8.1, sm_90), elsewhere four red.global.add.f32 (sm_20). 16-byte
// aligned; each element is added atomically, subnormals count as 0.
__device__ __forceinline__ void red_add(float* target, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(target), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target + i), "f"(x[i]) : "memory");
  }
#endif
}

}  // namespace online_attention::cuda::ptx
