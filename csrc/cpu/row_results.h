// SPDX-License-Identifier: BSD-3-Clause
// How a row leaves the loop over its keys, for one instruction set and one element type: finished,
// or as a part of it (split_keys.h), and how the parts become the row.
#pragma once

#include "cpu/query_tile.h"
#include "cpu/simd.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class RowResults {
 public:
  using Real = RealOf<Element>;

  // `sums`: the unnormalised output, in whole vectors.
  static void write(const SoftmaxRow<Real>& row, const Real* sums, int64_t D_v, double keep_scale,
                    void* out, void* lse) {
    write_scaled(row, keep_scale, D_v, out, [&](int64_t d) { return Lanes::load(sums + d); });
    *static_cast<Real*>(lse) = row.lse();  // (E10)
  }

  // As RowPart lies in memory.
  static void write_part(const SoftmaxRow<Real>& row, const Real* sums, int64_t D_v, void* out,
                         void* state) {
    for (int64_t d = 0; d < D_v; d += kLanes) {
      Lanes::store(Lanes::load(sums + d), static_cast<Real*>(out) + d);
    }
    *static_cast<SoftmaxRow<Real>*>(state) = row;
  }

  static void join(const RowParts& parts) {
    const auto state = [&](int64_t i) -> const SoftmaxRow<Real>& {
      return *reinterpret_cast<const SoftmaxRow<Real>*>(parts.first + i * parts.stride);
    };
    const auto* sums = reinterpret_cast<const Real*>(parts.first + RowPart::kOutput);
    const int64_t stride = parts.stride / static_cast<int64_t>(sizeof(Real));
    SoftmaxRow<Real> row;
    for (int64_t i = 0; i < parts.count; ++i) row.raise(state(i).m);
    Real weights[KeySplit::kMaxParts];
    for (int64_t i = 0; i < parts.count; ++i) {
      weights[i] = state(i).rescale_to(row);   // (E12)
      row.absorb(1, state(i).l * weights[i]);  // (E11)
    }
    write_scaled(row, parts.keep_scale, parts.D_v, parts.out, [&](int64_t d) {
      Vec sum = {};
      for (int64_t i = 0; i < parts.count; ++i) {
        sum += Lanes::splat(weights[i]) * Lanes::load(sums + i * stride + d);
      }
      return sum;
    });
    *static_cast<Real*>(parts.lse) = row.lse();  // (E10)
  }

 private:
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int kLanes = Lanes::kLanes;

  template <class Sum>
  static void write_scaled(const SoftmaxRow<Real>& row, double keep_scale, int64_t D_v, void* to,
                           Sum sum) {
    const Vec factor =
        Lanes::splat(row.inverse_sum() * static_cast<Real>(keep_scale));  // (E9), (E45)
    auto* out = static_cast<Element*>(to);
    int64_t d = 0;
    for (; d + kLanes <= D_v; d += kLanes) Lanes::store(sum(d) * factor, out + d);
    if (d < D_v) Lanes::store_first(sum(d) * factor, out + d, D_v - d);
  }
};

}  // namespace online_attention::cpu
