// SPDX-License-Identifier: BSD-3-Clause
// Scores become weights, (E7), and rows take a step of their softmax, (E6) to (E8).
#pragma once

#include <cmath>
#include <limits>

#include "cpu/micro_kernel.h"
#include "cpu/softmax_rows.h"

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

// kRows numbers, in whole vectors.
template <class Lanes, int kRows>
constexpr int kWholeVectors = (kRows + Lanes::kLanes - 1) / Lanes::kLanes * Lanes::kLanes;

// Calls visit(the rows, first) on groups of `rows` that fit the lanes of a vector.
template <int kLanes, int kFirst = 0, int kRows, class Vec, class Visit>
void for_each_group(Vec (&rows)[kRows], Visit visit) {
  constexpr int kCount = kRows - kFirst < kLanes ? kRows - kFirst : kLanes;
  visit(*reinterpret_cast<Vec(*)[kCount]>(rows + kFirst), kFirst);
  if constexpr (kFirst + kCount < kRows) for_each_group<kLanes, kFirst + kCount>(rows, visit);
}

// The scores in `keys` of kRows rows, kStride apart, become weights in place. The rows' softmax,
// from `row` on, takes them in; alpha[kWholeVectors] is what its sums were scaled by. What is
// folded across lanes or needs few lanes is done for all rows together, a vector of them at a time.
// before_row() is called before each row is weighed.
template <class Isa, class Operand, int kRows, int kStride, class Rows, class Real, class BeforeRow>
void weigh_rows(Rows& softmax, int row, Real* scores, Real* alpha, KvRange keys, Real factor,
                BeforeRow before_row) {
  using Lanes = typename Operand::Sums;
  using Vec = typename Lanes::Vec;
  Vec rows[kRows];
  alignas(64) Real top[kWholeVectors<Lanes, kRows>], base[kWholeVectors<Lanes, kRows>];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = largest<Lanes>(scores + i * kStride + keys.begin, keys.size());
  }
  for_each_group<Lanes::kLanes>(rows, [&](auto& group, int first) {
    const Vec tops = Lanes::max_of_rows(group);
    Lanes::store(tops, top + first);
    Lanes::store(softmax.raise(row + first, tops * Lanes::splat(factor)), alpha + first);  // (E6)
    Lanes::store(softmax.base(row + first), base + first);
  });
  for (int i = 0; i < kRows; ++i) {  // (E7)
    before_row();
    Real* s = scores + i * kStride;
    auto* p = reinterpret_cast<typename Operand::Weight*>(s) + keys.begin;
    rows[i] = weigh<Isa, Operand>(s + keys.begin, p, keys.size(), top[i], factor, base[i]);
  }
  for_each_group<Lanes::kLanes>(rows, [&](auto& group, int first) {
    softmax.absorb(row + first, Lanes::load(alpha + first), Lanes::sum_of_rows(group));  // (E8)
  });
}

}  // namespace online_attention::cpu
