// SPDX-License-Identifier: BSD-3-Clause
// Scores of one row become weights, (E7).
#pragma once

#include <cmath>
#include <limits>

#include "cpu/exp2.h"

namespace online_attention::cpu {

// exponent(scores) is the power of 2. Returns the sum of the weights.
template <class Lanes, class Real, class Weight, class Exponent>
Real weigh_each(const Real* s, Weight* p, int count, Exponent exponent) {
  typename Lanes::Vec sum = {};
  for (int n = 0; n < count; n += Lanes::kLanes) {
    const auto weights = exp2_of_lanes<Lanes, Real>(exponent(Lanes::load(s + n)));
    Lanes::store(weights, p + n);
    sum += weights;
  }
  return Lanes::sum_of_lanes(sum);
}

// p = 2^(s * factor - base), for `count` scores whose largest is `top`; p may take their place.
// Returns the sum of the weights.
template <class Isa, class Lanes, class Real, class Weight>
Real weigh(const Real* s, Weight* p, int count, Real top, Real factor, Real base) {
  using Vec = typename Lanes::Vec;
  const bool huge = std::fabs(base) > 1 / std::numeric_limits<Real>::epsilon();
  // Counted from the largest score, large weights come of small products: small roundings. And
  // base is a rounded product: where that could be off by 1, `top` must be rounded alike.
  if ((Isa::kRoundsProducts || huge) && top != -kInfinity<Real>) {
    const volatile Real rounded = top * factor;  // never fused with the subtraction
    const Real offset = huge ? rounded - base : static_cast<Real>(std::fma(top, factor, -base));
    return weigh_each<Lanes>(s, p, count, [=](Vec score) {
      return (score - Lanes::splat(top)) * Lanes::splat(factor) + Lanes::splat(offset);
    });
  }
  return weigh_each<Lanes>(
      s, p, count, [=](Vec score) { return score * Lanes::splat(factor) - Lanes::splat(base); });
}

}  // namespace online_attention::cpu
