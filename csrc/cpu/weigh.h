// SPDX-License-Identifier: BSD-3-Clause
// Scores of one row become weights, (E7).
#pragma once

#include <cmath>
#include <limits>

#include "cpu/exp2.h"

namespace online_attention::cpu {

// exponent(scores) is the power of 2. Returns the sum of the weights, to be folded.
template <class Operand, class Exponent>
typename Operand::Sums::Vec weigh_each(const typename Operand::Real* s, typename Operand::Weight* p,
                                       int count, Exponent exponent) {
  using Sums = typename Operand::Sums;
  typename Sums::Vec sum = {};
  for (int n = 0; n < count; n += Sums::kLanes) {
    const auto weights = exp2_of_lanes<Sums, typename Operand::Real>(exponent(Sums::load(s + n)));
    Operand::store_weights(weights, p + n);
    sum += weights;
  }
  return sum;
}

// p = 2^(s * factor - base), for `count` scores whose largest is `top`; p may take their place.
// Returns the sum of the weights, to be folded.
template <class Isa, class Operand, class Real = typename Operand::Real>
typename Operand::Sums::Vec weigh(const Real* s, typename Operand::Weight* p, int count, Real top,
                                  Real factor, Real base) {
  using Sums = typename Operand::Sums;
  using Vec = typename Sums::Vec;
  const bool huge = std::fabs(base) > 1 / std::numeric_limits<Real>::epsilon();
  // Counted from the largest score, large weights come of small products: small roundings. And
  // base is a rounded product: where that could be off by 1, `top` must be rounded alike.
  if ((Isa::kRoundsProducts || huge) && top != -kInfinity<Real>) {
    const volatile Real rounded = top * factor;  // never fused with the subtraction
    const Real offset = huge ? rounded - base : static_cast<Real>(std::fma(top, factor, -base));
    return weigh_each<Operand>(s, p, count, [=](Vec score) {
      return (score - Sums::splat(top)) * Sums::splat(factor) + Sums::splat(offset);
    });
  }
  return weigh_each<Operand>(
      s, p, count, [=](Vec score) { return score * Sums::splat(factor) - Sums::splat(base); });
}

}  // namespace online_attention::cpu
