// SPDX-License-Identifier: BSD-3-Clause
// The online softmax of one query row. Equations (E..) are those of docs/algorithm.md.
//
// Scores arrive in base-2 units: s2 = scale * log2(e) * <q, k>. A row state is the pair (m, l): the
// largest score so far and the sum of 2^(s2 - m). States under `merge` form a commutative monoid
// whose identity is the empty row, which is why keys may be cut into tiles, splits and ranks, and
// the parts combined in any order.
#pragma once

#include "core/hd.h"

namespace online_attention {

template <typename Real>
struct SoftmaxRow {
  Real m = -kInfinity<Real>;  // the largest score seen; after raise_lazily, at most slack below it
  Real l = 0;

  // m, or 0 while the row has seen nothing. The only guard against (-inf) - (-inf) in the project.
  ONLINE_ATTENTION_HD Real base() const { return m == -kInfinity<Real> ? Real(0) : m; }

  // (E6) m := max(m, tile_max). Returns alpha, the factor that brings sums and outputs gathered
  // under the old maximum to the new one; 0 for a row that was empty, whatever the tile holds.
  ONLINE_ATTENTION_HD Real raise(Real tile_max) {
    const Real m_old = m;
    m = max_of(m, tile_max);
    return exp2_of(m_old - base());
  }

  // (E6) with slack: m stays where it is until the tile's maximum exceeds it by more than `slack`,
  // and alpha is 1 until then. Weights may reach 2^slack; outputs and lse are the same, because
  // they do not depend on which m a sum is taken under. For kernels that skip rescaling by 1.
  ONLINE_ATTENTION_HD Real raise_lazily(Real tile_max, Real slack) {
    return tile_max - m > slack ? raise(tile_max) : Real(1);  // exact where m + slack is not
  }

  // (E7) p = 2^(s2 - m), the unnormalised probability of one score. A hidden score (-inf) gives 0.
  ONLINE_ATTENTION_HD Real weight(Real s2) const { return exp2_of(s2 - base()); }

  // (E8) l := alpha * l + sum of the tile's weights. Linear in l: threads that share a row may each
  // keep a partial l and add them up once at the end.
  ONLINE_ATTENTION_HD void absorb(Real alpha, Real tile_sum) { l = l * alpha + tile_sum; }

  // (E12) The factor that brings this row's outputs to the maximum of `merged`, a state this row
  // has been merged into.
  ONLINE_ATTENTION_HD Real rescale_to(const SoftmaxRow& merged) const {
    return exp2_of(m - merged.base());
  }

  // (E11) The state of two disjoint sets of keys taken together.
  ONLINE_ATTENTION_HD static SoftmaxRow merge(const SoftmaxRow& a, const SoftmaxRow& b) {
    SoftmaxRow both;
    both.m = max_of(a.m, b.m);
    both.l = a.l * a.rescale_to(both) + b.l * b.rescale_to(both);
    return both;
  }

  // (E9) 1 / l, and 0 for a row that saw no key: its output is 0, not NaN.
  ONLINE_ATTENTION_HD Real inverse_sum() const { return l == Real(0) ? Real(0) : Real(1) / l; }

  // (E10) Natural log of the sum of exp(score): ln 2 * (m + log2 l). -inf for an empty row.
  ONLINE_ATTENTION_HD Real lse() const {
    return l == Real(0) ? -kInfinity<Real> : (m + log2_of(l)) * Real(kLn2);
  }

  // The state of a finished part that is known by its lse alone: the sum becomes 1 under m = lse.
  ONLINE_ATTENTION_HD static SoftmaxRow from_lse(Real lse) {
    SoftmaxRow row;
    row.m = lse * Real(kLog2e);
    row.l = lse == -kInfinity<Real> ? Real(0) : Real(1);
    return row;
  }
};

}  // namespace online_attention
