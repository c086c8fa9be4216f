// SPDX-License-Identifier: BSD-3-Clause
// What the backward pass has to know of the query rows before it takes their gradients: delta, and
// the softmax of each row.
//
// A row's lse gives its P, with a relative error of about the last bit of the lse in natural units.
// Where the lse is far from 0 that is too much (at 1e8 it is 8, and P could be off by a factor of
// 2^8), so maximum and sum of such rows are taken anew, from the same scores that P is taken from.
#pragma once

#include "cpu/tile_scores.h"

namespace online_attention::cpu {

// Returns whether some row is far: then all keys have to be measured.
template <class Isa, class Element>
bool prepare_rows(const KeyTile& tile, const QueryRows& rows) {
  using Real = RealOf<Element>;
  using Lanes = Simd<Isa, Real>;
  bool some_far = false;
  for (int row = 0; row < rows.rows; ++row) {
    const Real lse = static_cast<const Real*>(rows.lse)[row];
    const bool far = RowStates<Isa, Element>::is_far(lse);
    some_far |= far;
    static_cast<SoftmaxRow<Real>*>(rows.softmax)[row] =
        far ? SoftmaxRow<Real>{} : SoftmaxRow<Real>::from_lse(lse);
    const auto* q = static_cast<const Element*>(rows.q[row]);
    const auto* dout = static_cast<const Element*>(rows.dout[row]);
    rows.finite[row] = static_cast<uint8_t>((all_finite<Lanes>(q, tile.D) ? kFiniteQ : 0) |
                                            (all_finite<Lanes>(dout, tile.D_v) ? kFiniteDout : 0));
    if (!tile.wants_ds) continue;
    // (E28)
    const Element* const factors[] = {dout, static_cast<const Element*>(rows.out[row])};
    typename Lanes::Vec sum = {};
    for_each_vector<Lanes>(factors, tile.D_v, [&](int64_t, const auto& v) { sum += v[0] * v[1]; });
    const auto* dlse = static_cast<const Real*>(rows.dlse);
    static_cast<Real*>(rows.delta)[row] =
        Lanes::sum_of_lanes(sum) - (dlse == nullptr ? Real(0) : dlse[row]);
  }
  return some_far;
}

template <class Isa, class Element>
class FarRows : TileScores<Isa, Element> {
 public:
  // The far rows take in the keys of one tile.
  static void measure(const KeyTile& tile, const QueryRows& rows, std::byte* scratch) {
    FarRows far(tile, scratch);
    far.pack_keys();
    far.take_rows(rows);
    for (int panel = 0; panel < far.keys_; panel += kPanelKeys) {
      far.for_each_block([&]<int kRows>(RowBlock<kRows> block) { far.add(block, panel); });
    }
  }

 private:
  using Base = TileScores<Isa, Element>;
  using Base::Base;
  using Base::kLanes, Base::kPanelKeys, Base::rows_, Base::states_;
  using typename Base::Lanes, typename Base::Real, typename Base::Vec;

  template <int kRows>
  void add(RowBlock<kRows> block, int panel) {
    if (!Base::overlap(Base::seen(block).by_some, {panel, panel + kPanelKeys})) return;
    Real scores[kRows * kPanelKeys];
    Base::multiply_scores(block, scores, panel);
    for (int i = 0; i < block.rows; ++i) {
      const int row = block.row_begin + i;
      if (!states_.is_far(static_cast<const Real*>(rows_->lse)[row])) continue;
      absorb(row, scores + i * kPanelKeys, panel);
    }
  }

  void absorb(int row, Real* s, int panel) {
    Base::hide_scores(row, s, panel);
    const Real top = Lanes::max_of_lanes(largest<Lanes>(s, kPanelKeys));
    const volatile Real tile_max = top * Base::bias_.factor();  // one rounding
    SoftmaxRow<Real>& softmax = static_cast<SoftmaxRow<Real>*>(rows_->softmax)[row];
    const Real alpha = softmax.raise(tile_max);  // (E6)
    Vec sum = {};
    for (int n = 0; n < kPanelKeys; n += kLanes) {
      sum += states_.weight(Lanes::load(s + n), softmax.base());  // (E7)
    }
    softmax.absorb(alpha, Lanes::sum_of_lanes(sum));  // (E8)
  }
};

}  // namespace online_attention::cpu
