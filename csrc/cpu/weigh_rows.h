// SPDX-License-Identifier: BSD-3-Clause
// The softmax steps of a block of rows, a vector of rows at a time.
#pragma once

#include "cpu/micro_kernel.h"
#include "cpu/row_block.h"
#include "cpu/softmax_rows.h"
#include "cpu/weigh.h"

namespace online_attention::cpu {

// kRows rows from `row_begin` on take in `panels` of their scores, [kRows][kStride], which become
// weights in their place; alpha, [padded_rows(kRows)], is what it was in (E6). Calls before_row()
// before each row.
template <class Isa, class Operand, int kRows, int kStride, class Rows, class BeforeRow>
void weigh_rows(Rows& softmax, int row_begin, typename Operand::Real* scores,
                typename Operand::Real* alpha, KvRange panels, typename Operand::Real factor,
                BeforeRow before_row) {
  using Lanes = typename Operand::Sums;
  using Real = typename Operand::Real;
  using Vec = typename Lanes::Vec;
  constexpr int kLanes = Lanes::kLanes, kPadded = padded_rows<kLanes>(kRows);
  Vec rows[kPadded];
  Real top[kPadded], base[kPadded];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = largest<Lanes>(scores + i * kStride + panels.begin, panels.size());
  }
  for_each_group<kLanes, kRows>([&]<int kCount>(std::integral_constant<int, kCount>, int first) {
    Vec(&group)[kCount] = *reinterpret_cast<Vec(*)[kCount]>(rows + first);
    const Vec tops = Lanes::max_of_rows(group);
    Lanes::store(tops, top + first);
    const int row = row_begin + first;
    Lanes::store(softmax.raise(row, tops * Lanes::splat(factor)), alpha + first);  // (E6)
    Lanes::store(softmax.base(row), base + first);
  });
  for (int i = 0; i < kRows; ++i) {  // (E7)
    before_row();
    Real* s = scores + i * kStride;
    auto* p = reinterpret_cast<typename Operand::Weight*>(s);
    rows[i] = weigh<Isa, Operand>(s + panels.begin, p + panels.begin, panels.size(), top[i], factor,
                                  base[i]);
  }
  for_each_group<kLanes, kRows>([&]<int kCount>(std::integral_constant<int, kCount>, int first) {
    Vec(&group)[kCount] = *reinterpret_cast<Vec(*)[kCount]>(rows + first);
    softmax.absorb(row_begin + first, Lanes::load(alpha + first),
                   Lanes::sum_of_rows(group));  // (E8)
  });
}

}  // namespace online_attention::cpu
