// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <limits>

namespace online_attention::cuda {

// A weight 2^(score * scale - m) takes the product fused with the subtraction, so that it is not
// rounded by itself; m, such a product too, is. The largest score then weighs 2^(rounding of m) in
// place of 1, which cancels as long as it is near 1: up to this |m|, where it is rounded by at most
// 1. Beyond, both products must be rounded alike.
template <typename Real>
inline constexpr Real kFusedUpTo = 1 / std::numeric_limits<Real>::epsilon();

// a * b rounded, never fused with an addition behind it.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// The smaller of a and a number b; NaN if a is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));  // PTX 7.0, sm_80
  return smaller;
#else
  return a > b ? b : a;
#endif
}

// The larger of a and a number b; NaN if a is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));  // PTX 7.0, sm_80
  return larger;
#else
  return a < b ? b : a;
#endif
}

}  // namespace online_attention::cuda
