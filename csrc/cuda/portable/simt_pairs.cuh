// SPDX-License-Identifier: BSD-3-Clause
// What the SIMT kernels do pair by pair: a bias in base-2 units, and which pairs dropout drops.
#pragma once

#include "core/dropout.h"
#include "cuda/bias.cuh"

namespace online_attention::cuda::portable {

template <typename Real>
inline constexpr Real kLowest = std::numeric_limits<Real>::lowest();

// x, as if it were new: what is computed from it the compiler cannot take out of a loop over tiles,
// where it would hold registers for all of the loop.
__device__ __forceinline__ int32_t anew(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// An element of a bias in base-2 units. Of finite ones none becomes -inf, which would hide a pair:
// the lowest number of a type is often given for a mask. -inf itself is the caller's to look for.
template <typename Real>
__device__ __forceinline__ Real bias_log2(Real bias) {
  const Real log2 = bias * Real(kLog2e);
  return log2 < kLowest<Real> ? kLowest<Real> : log2;
}

// The bias of one query and keys kv + kAcross * j, j < kCount, in natural units, to
// target[kAcross * j]; -inf for keys that do not exist. `row` is that of key 0.
template <int kAcross, int kCount, typename BiasElement, typename Real>
__device__ __forceinline__ void fetch_bias(Real* target, const BiasElement* row, int64_t stride,
                                           int32_t kv, int32_t s_kv) {
  const BiasElement* element = row + kv * stride;
  Real bias[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    bias[j] = kv + kAcross * j < s_kv ? bias_of<Real>(*element) : -kInfinity<Real>;
    element += kAcross * stride;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) target[kAcross * j] = bias[j];
}

// Calls dropped(j) for those of the keys kv + x + kAcross * j, j < kCount, that dropout drops for a
// query; `kv` is a multiple of 32 and 0 <= x < kAcross. Keys of one call (core/dropout.h) share it.
template <int kAcross, int kCount, typename Dropped>
__device__ __forceinline__ void for_dropped(const Dropout& dropout, int64_t head, int32_t q_idx,
                                            int32_t kv, int x, const Dropped& dropped) {
  static_assert(Dropout::kKeysOfGroup == 32 && (kAcross == 8 || kAcross == 16));
  constexpr int kSharing = 32 / kAcross;
  static_assert(kCount % kSharing == 0);
  const int odd = x & 1;
#pragma unroll
  for (int j = 0; j < kCount; j += kSharing) {
    const Philox4x32 bits = dropout.bits(head, q_idx, Dropout::call_of(kv + x + kAcross * j));
#pragma unroll
    for (int s = 0; s < kSharing; ++s) {
      // The element of key kv + x + kAcross * (j + s), so written that the words of the call, which
      // lie in registers, are told apart by constants.
      const int element = Dropout::element_of(kAcross * s) + odd;
      bool keeps = dropout.keeps(bits, element);
      if (kAcross == 16 && x >= 8) keeps = dropout.keeps(bits, element + 2);
      if (!keeps) dropped(j + s);
    }
  }
}

}  // namespace online_attention::cuda::portable
