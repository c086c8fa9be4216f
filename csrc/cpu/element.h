// SPDX-License-Identifier: BSD-3-Clause
// The stored number types, and the type each is computed in.
#pragma once

#include <cstdint>

namespace online_attention::cpu {

struct F16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

template <class Element>
struct ComputedIn {
  using Real = float;
};
template <>
struct ComputedIn<double> {
  using Real = double;
};
template <class Element>
using RealOf = typename ComputedIn<Element>::Real;

}  // namespace online_attention::cpu
