// SPDX-License-Identifier: BSD-3-Clause
// Register tiles of the warp-wide mma, and what a warp does with their rows.
//
// Accumulator of m16n8 (fp32, 4 registers): lane 4g + t holds
//     c0 c1 = row g,     columns 2t, 2t + 1
//     c2 c3 = row g + 8, columns 2t, 2t + 1
// A operand of m16k16 (16-bit pairs, 4 registers): the same lane holds
//     a0 = row g, k 2t..   a1 = row g + 8, k 2t..   a2 = row g, k 2t + 8..   a3 = row g + 8, ...
// So two neighbouring accumulator tiles, rounded, are the A operand of one k16 step: probabilities
// need no shuffle between the two products. The four lanes of equal g (a quad) hold a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/hd.h"

namespace online_attention::cuda {

// Two floats, rounded to nearest even, in one register; `low` is the element of smaller index.
template <typename Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Two elements in one register.
template <typename Element>
struct PairTraits;
template <>
struct PairTraits<__half> {
  using Pair = __half2;
};
template <>
struct PairTraits<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
};
template <typename Element>
using PairOf = typename PairTraits<Element>::Pair;
template <typename Element>
__device__ __forceinline__ PairOf<Element> zero_pair() {
  constexpr uint32_t kZeros = 0;
  return reinterpret_cast<const PairOf<Element>&>(kZeros);
}

// The exponent bits of a 16-bit type: Inf and NaN have all of them set.
template <typename Element>
inline constexpr uint32_t kExponentBits = 0;
template <>
inline constexpr uint32_t kExponentBits<__half> = 0x7c00;
template <>
inline constexpr uint32_t kExponentBits<__nv_bfloat16> = 0x7f80;

// A register of two 16-bit elements with Inf and NaN replaced by zero.
template <typename Element>
__device__ __forceinline__ uint32_t without_nonfinite(uint32_t pair) {
  constexpr uint32_t kLow = kExponentBits<Element>, kHigh = kLow << 16;
  if ((pair & kLow) == kLow) pair &= 0xffff0000u;
  if ((pair & kHigh) == kHigh) pair &= 0x0000ffffu;
  return pair;
}

// Reductions over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = max_of(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_of(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace online_attention::cuda
