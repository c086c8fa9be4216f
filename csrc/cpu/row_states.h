// SPDX-License-Identifier: BSD-3-Clause
// What the backward pass knows of each query row while it works on one key tile: the softmax that
// the forward pass left, and the keys the row sees.
#pragma once

#include "cpu/exp2.h"
#include "cpu/gradient_tile.h"

namespace online_attention::cpu {

// Of the tile's keys, those that some row, and those that all rows of a block see.
struct Visibility {
  KvRange by_some, by_all;
};

template <class Isa, class Real>
class RowStates {
 public:
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;
  using Bits = typename Lanes::Bits;

  explicit RowStates(double scale_log2) : factor_(static_cast<Real>(scale_log2)) {}

  // Row `row` of the set; `keys` are those of the tile.
  void set(int row, const QueryRows& rows, KvRange keys) {
    lse_[row] = static_cast<const Real*>(rows.lse)[row];
    delta_[row] = rows.delta == nullptr ? Real(0) : static_cast<const Real*>(rows.delta)[row];
    base_[row] = SoftmaxRow<Real>::from_lse(lse_[row]).base();
    const KvRange seen = rows.visible[row];
    const int32_t begin = seen.begin > keys.begin ? seen.begin - keys.begin : 0;
    const int32_t end = (seen.end < keys.end ? seen.end : keys.end) - keys.begin;
    const bool empty = begin >= end || lse_[row] == -kInfinity<Real>;  // (E23)
    visible_[row] = empty ? KvRange{} : KvRange{begin, end};
  }
  // The padding of a block, which sees nothing.
  void set_empty(int row) {
    lse_[row] = base_[row] = delta_[row] = 0;
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
    return exp2_of_lanes<Lanes, Real>(exponent(row, score));
  }

  // (E29)
  Vec score_gradient(int row, Vec p, Vec dp) const { return p * (dp - Lanes::splat(delta_[row])); }

  // x where the row sees the kLanes keys from `key` on, 0 where it does not.
  Vec if_visible(int row, int key, Vec x) const {
    using Integer = typename Lanes::Integer;
    const Bits keys = Lanes::iota() + Lanes::splat_bits(static_cast<Integer>(key));
    const auto hidden = (keys < Lanes::splat_bits(static_cast<Integer>(visible_[row].begin))) |
                        (keys >= Lanes::splat_bits(static_cast<Integer>(visible_[row].end)));
    return hidden ? Vec{} : x;
  }

 private:
  // Beyond, what the last bit of the base stands for shows in P.
  static constexpr Real kFar = 64;

  // s2 - lse log2(e). Far from 0 in natural units, where each number is rounded as the forward pass
  // rounded the largest score on its way into the lse: the difference is exactly 0 for a score that
  // outweighs all others, and above 0 for none.
  Vec exponent(int row, Vec score) const {
    const Vec factor = Lanes::splat(factor_);
    const bool far = base_[row] > kFar || base_[row] < -kFar;
    if (!far) return score * factor - Lanes::splat(base_[row]);
    const Vec s = rounded(score * factor * Lanes::splat(Real(kLn2)));
    const Vec difference = (s - Lanes::splat(lse_[row])) * Lanes::splat(Real(kLog2e));
    return difference > 0 ? Vec{} : difference;
  }

  // x, and never fused with what is done to it next: the compiler does not know that zero_ is 0.
  Vec rounded(Vec x) const { return (Vec)((Bits)x ^ Lanes::splat_bits(zero_)); }

  const Real factor_;
  const volatile typename Lanes::Integer zero_ = 0;
  Real lse_[QueryRows::kMaxRows], base_[QueryRows::kMaxRows], delta_[QueryRows::kMaxRows];
  KvRange visible_[QueryRows::kMaxRows];
};

}  // namespace online_attention::cpu
