// SPDX-License-Identifier: BSD-3-Clause
// Reads elements of a Bias on the device. The kernels branch on its type once for many elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/bias.h"

namespace online_attention::cuda {

// One byte: torch's bool.
struct Visible {
  uint8_t byte;
};

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

}  // namespace online_attention::cuda
