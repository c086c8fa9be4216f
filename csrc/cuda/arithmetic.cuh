// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace online_attention::cuda {

// a * b rounded, never fused with an addition behind it. A weight 2^(score * scale - m) may use a
// fused product only while the rounding of m, itself such a product, stays far below 1.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

}  // namespace online_attention::cuda
