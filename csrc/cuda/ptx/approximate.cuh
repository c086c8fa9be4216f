// SPDX-License-Identifier: BSD-3-Clause
// Functions the device approximates in one instruction. Subnormal numbers count as 0.
#pragma once

namespace online_attention::cuda::ptx {

// rcp.approx.ftz.f32 (PTX 1.4): 1 / x to one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// lg2.approx.ftz.f32 (PTX 1.4): log2 x to 2^-22, absolute where x is in [0.5, 2]; -inf of 0.
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace online_attention::cuda::ptx
