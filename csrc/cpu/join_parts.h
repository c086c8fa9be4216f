// SPDX-License-Identifier: BSD-3-Clause
// The parts of a row become the row, for one instruction set and one element type.
#pragma once

#include "cpu/query_tile.h"
#include "cpu/simd.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class JoinParts {
 public:
  static void join(const RowParts& parts) {
    SoftmaxRow<Real> row;
    for (int64_t i = 0; i < parts.count; ++i) row.raise(state(parts, i).m);
    Real weights[KeySplit::kMaxParts];
    for (int64_t i = 0; i < parts.count; ++i) {
      const SoftmaxRow<Real>& part = state(parts, i);
      weights[i] = part.rescale_to(row);   // (E12)
      row.absorb(1, part.l * weights[i]);  // (E11)
    }
    const Vec inverse_sum =
        Lanes::splat(row.inverse_sum() * static_cast<Real>(parts.keep_scale));  // (E9), (E45)
    auto* out = static_cast<Element*>(parts.out);
    for (int64_t d = 0; d < parts.D_v; d += kLanes) {
      Vec sum = {};
      for (int64_t i = 0; i < parts.count; ++i) {
        sum += Lanes::splat(weights[i]) * Lanes::load(output(parts, i) + d);
      }
      const bool whole = parts.D_v - d >= kLanes;
      whole ? Lanes::store(sum * inverse_sum, out + d)
            : Lanes::store_first(sum * inverse_sum, out + d, parts.D_v - d);
    }
    *static_cast<Real*>(parts.lse) = row.lse();  // (E10)
  }

 private:
  using Real = RealOf<Element>;
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int kLanes = Lanes::kLanes;

  static const SoftmaxRow<Real>& state(const RowParts& parts, int64_t i) {
    return *reinterpret_cast<const SoftmaxRow<Real>*>(parts.first + i * parts.stride);
  }
  static const Real* output(const RowParts& parts, int64_t i) {
    return reinterpret_cast<const Real*>(parts.first + i * parts.stride + RowPart::kOutput);
  }
};

}  // namespace online_attention::cpu
