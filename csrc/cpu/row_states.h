// SPDX-License-Identifier: BSD-3-Clause
// What the backward pass knows of each query row while it works on one key tile: the softmax that
// the forward pass left, and the keys the row sees.
#pragma once

#include "cpu/exp2.h"
#include "cpu/gradient_tile.h"
#include "cpu/row_block.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class RowStates {
 public:
  using Real = RealOf<Element>;
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;
  using Bits = typename Lanes::Bits;

  // `factor` brings scores to base-2 units.
  explicit RowStates(Real factor) : factor_(factor) {}

  // Row `row` of the set; `keys` are those of the tile.
  void set(int row, const QueryRows& rows, KvRange keys) {
    const SoftmaxRow<Real> softmax = static_cast<const SoftmaxRow<Real>*>(rows.softmax)[row];
    const Real lse = static_cast<const Real*>(rows.lse)[row];
    base_[row] = softmax.base();
    far_[row] = is_far(lse);
    inverse_sum_[row] = softmax.inverse_sum();
    delta_[row] = rows.delta == nullptr ? Real(0) : static_cast<const Real*>(rows.delta)[row];
    const KvRange seen = rows.visible[row];
    const int32_t begin = seen.begin > keys.begin ? seen.begin - keys.begin : 0;
    const int32_t end = (seen.end < keys.end ? seen.end : keys.end) - keys.begin;
    const bool empty = begin >= end || lse == -kInfinity<Real>;  // (E23)
    visible_[row] = empty ? KvRange{} : KvRange{begin, end};
  }
  // The padding of a block, which sees nothing.
  void set_empty(int row) {
    base_[row] = inverse_sum_[row] = delta_[row] = 0;
    far_[row] = false;
    visible_[row] = {};
  }

  // Counted from the tile's first key.
  KvRange visible(int row) const { return visible_[row]; }

  Visibility visible(int row_begin, int row_end, int32_t keys) const {
    Visibility seen = {{keys, 0}, {0, keys}};
    for (int row = row_begin; row < row_end; ++row) {
      const KvRange range = visible_[row];
      if (range.begin > seen.by_all.begin) seen.by_all.begin = range.begin;
      if (range.end < seen.by_all.end) seen.by_all.end = range.end;
      if (range.begin >= range.end) continue;
      if (range.begin < seen.by_some.begin) seen.by_some.begin = range.begin;
      if (range.end > seen.by_some.end) seen.by_some.end = range.end;
    }
    return seen;
  }

  // (E25)
  Vec probability(int row, Vec score) const {
    if (far_[row]) return weight(score, base_[row]) * Lanes::splat(inverse_sum_[row]);
    const Vec s2 = score * Lanes::splat(factor_);
    return exp2_of_lanes<Lanes, Real>(s2 - Lanes::splat(base_[row]));
  }

  // The weight of a score in a far row whose maximum is `base`. Both products are rounded alike:
  // the largest score weighs 1.
  Vec weight(Vec score, Real base) const {
    return exp2_of_lanes<Lanes, Real>(rounded(score * Lanes::splat(factor_)) - Lanes::splat(base));
  }

  // Whether P may not be taken from the lse, whose last bit stands for too much.
  static bool is_far(Real lse) { return lse > kFar || (lse < -kFar && lse != -kInfinity<Real>); }

  // (E29)
  Vec score_gradient(int row, Vec p, Vec dp) const { return p * (dp - Lanes::splat(delta_[row])); }

  // x where the row's range has the kLanes keys from `key` on, 0 where it has not.
  Vec if_visible(int row, int key, Vec x) const {
    using Integer = typename Lanes::Integer;
    const Bits keys = Lanes::iota() + Lanes::splat_bits(static_cast<Integer>(key));
    const auto hidden = (keys < Lanes::splat_bits(static_cast<Integer>(visible_[row].begin))) |
                        (keys >= Lanes::splat_bits(static_cast<Integer>(visible_[row].end)));
    return hidden ? Vec{} : x;
  }

 private:
  // The rounding of narrow results hides more.
  static constexpr Real kFar = sizeof(Element) < sizeof(Real) ? 1024 : 16;

  // x, and never fused with what is done to it next: the compiler does not know that zero_ is 0.
  Vec rounded(Vec x) const { return (Vec)((Bits)x ^ Lanes::splat_bits(zero_)); }

  const Real factor_;
  const volatile typename Lanes::Integer zero_ = 0;
  Real base_[QueryRows::kMaxRows], inverse_sum_[QueryRows::kMaxRows], delta_[QueryRows::kMaxRows];
  bool far_[QueryRows::kMaxRows];
  KvRange visible_[QueryRows::kMaxRows];
};

}  // namespace online_attention::cpu
