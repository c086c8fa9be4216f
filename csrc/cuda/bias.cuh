// SPDX-License-Identifier: BSD-3-Clause
// Reads elements of a Bias on the device. The kernels branch on its type once for many elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <type_traits>

#include "core/bias.h"

namespace online_attention::cuda {

// One byte: torch's bool.
struct Visible {
  uint8_t byte;
};

// Elements below this, natural units, count as this: -inf apart, which hides, what a bias adds
// stays finite in base-2 units. (A common way to write "hidden" is the smallest number of the
// dtype.)
template <typename Real>
inline constexpr Real kLowestBias = -std::numeric_limits<Real>::max() / 3 * 2;

// What an element adds to a score in natural units; -inf hides it.
template <typename Real, typename Element>
__device__ __forceinline__ Real bias_of(const Element& element) {
  return static_cast<Real>(element);
}
template <>
__device__ __forceinline__ float bias_of<float, Visible>(const Visible& element) {
  return element.byte != 0 ? 0.0f : -kInfinity<float>;
}
template <>
__device__ __forceinline__ double bias_of<double, Visible>(const Visible& element) {
  return element.byte != 0 ? 0.0 : -kInfinity<double>;
}

template <int kBytes>
using Unsigned = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

// The elements of two neighbouring keys, the first even, in as many bits.
template <typename Element>
struct BiasPair {
  static constexpr int kBytes = sizeof(Element);
  using One = Unsigned<kBytes>;
  using Both = Unsigned<2 * kBytes>;
  Both bits = 0;

  // Both in one access.
  __device__ __forceinline__ void read(const Element* at) {
    bits = *reinterpret_cast<const Both*>(at);
  }
  // One of them, into zeros.
  __device__ __forceinline__ void read_one(int j, const Element* at) {
    bits |= static_cast<Both>(Both{*reinterpret_cast<const One*>(at)} << (8 * kBytes * j));
  }
  __device__ __forceinline__ Element operator[](int j) const {
    const auto one = static_cast<One>(bits >> (8 * kBytes * j));
    return reinterpret_cast<const Element&>(one);
  }
};
// Whether every such pair of a bias for queries of `q_bytes` bytes lies in one piece, and no
// pair is cut by the last key.
inline bool is_readable_in_pairs(const Bias& bias, int64_t s_kv, int64_t q_bytes) {
  const int64_t bytes = bias.element_bytes(q_bytes);
  return bias.stride_kv == 1 && s_kv % 2 == 0 && bias.stride_b % 2 == 0 && bias.stride_h % 2 == 0 &&
         bias.stride_q % 2 == 0 && reinterpret_cast<uintptr_t>(bias.data) % (2 * bytes) == 0;
}

// A score in base-2 units (fp32) with the bias of its pair; -inf where that hides, whatever the
// score was.
template <typename Element>
__device__ __forceinline__ float biased(float score, const Element& element) {
  if constexpr (std::is_same_v<Element, Visible>) {
    return element.byte != 0 ? score : -kInfinity<float>;
  } else {
    const auto bias = static_cast<float>(element);
    const float finite = bias < kLowestBias<float> ? kLowestBias<float> : bias;  // NaN stays
    const float sum = fmaf(finite, static_cast<float>(kLog2e), score);
    return bias == -kInfinity<float> ? bias : sum;
  }
}

// Calls visit(Type()) with the type that the bias of queries of type Element has; not for `none`.
template <typename Element, typename Visit>
__device__ __forceinline__ void with_bias_type(const Bias& bias, const Visit& visit) {
  if (bias.type == BiasType::boolean) {
    visit(Visible());
  } else if (bias.type == BiasType::element) {
    visit(Element());
  } else {
    visit(float());
  }
}

// Whether the bias hides one pair by itself; both indices exist.
template <typename Element>
__device__ __forceinline__ bool hides(const Bias& bias, int64_t b, int64_t h, int32_t q_idx,
                                      int32_t kv_idx) {
  bool hidden = false;
  with_bias_type<Element>(bias, [&](auto type) {
    const auto* row = bias.row<decltype(type)>(b, h, q_idx);
    hidden = bias_of<float>(row[kv_idx * bias.stride_kv]) == -kInfinity<float>;
  });
  return hidden;
}

}  // namespace online_attention::cuda
