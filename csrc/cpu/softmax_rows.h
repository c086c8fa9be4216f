// SPDX-License-Identifier: BSD-3-Clause
// SoftmaxRow of core/, for the rows of a tile: those of a block lie side by side, and take a step
// together, a vector of them at a time.
#pragma once

#include "core/softmax_row.h"
#include "cpu/exp2.h"

namespace online_attention::cpu {

// For kMaxRows rows in blocks of kBlockRows and one smaller block.
template <class Lanes, class Real, int kMaxRows, int kBlockRows>
class SoftmaxRows {
 public:
  using Vec = typename Lanes::Vec;
  static constexpr int kLanes = Lanes::kLanes;

  SoftmaxRows() {
    for (Real& m : m_) m = -kInfinity<Real>;
    for (Real& l : l_) l = 0;
  }

  SoftmaxRow<Real> row(int row) const { return {m_[place(row)], l_[place(row)]}; }

  // (E6) for the kLanes rows from `row` on, whose maxima in the next tile are given. Returns alpha.
  Vec raise(int row, Vec tile_max) {
    Real* m = m_ + place(row);
    const Vec old = Lanes::load(m), raised = Lanes::max(tile_max, old);
    Lanes::store(raised, m);
    return exp2_of_lanes<Lanes, Real>(old - base(raised));  // exactly 1 where the maximum stays
  }

  Vec base(int row) const { return base(Lanes::load(m_ + place(row))); }

  // (E8)
  void absorb(int row, Vec alpha, Vec tile_sum) {
    Real* l = l_ + place(row);
    Lanes::store(Lanes::load(l) * alpha + tile_sum, l);
  }

 private:
  static constexpr int kStride = (kBlockRows + kLanes - 1) / kLanes * kLanes;
  static constexpr int kPlaces = (kMaxRows / kBlockRows + 1) * kStride;

  static int place(int row) { return row / kBlockRows * kStride + row % kBlockRows; }
  static Vec base(Vec m) { return m == Lanes::splat(-kInfinity<Real>) ? Vec{} : m; }

  alignas(64) Real m_[kPlaces];
  alignas(64) Real l_[kPlaces];
};

}  // namespace online_attention::cpu
