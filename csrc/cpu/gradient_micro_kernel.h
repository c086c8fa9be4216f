// SPDX-License-Identifier: BSD-3-Clause
// The matrix products of the backward pass and the packing they need, in the manner of
// micro_kernel.h.
#pragma once

#include <type_traits>

#include "cpu/micro_kernel.h"

namespace online_attention::cpu {

// Calls visit(kVecs as a constant, d) on panels of columns that begin at d: kMaxVecs vectors wide,
// then of one each.
template <int kLanes, int kMaxVecs, class Visit>
void for_each_panel(int64_t D, Visit visit) {
  int64_t d = 0;
  for (; d + (kMaxVecs - 1) * kLanes < D; d += kMaxVecs * kLanes) {
    visit(std::integral_constant<int, kMaxVecs>{}, d);
  }
  for (; d < D; d += kLanes) visit(std::integral_constant<int, 1>{}, d);
}

// Rows 0 to `rows` of D columns in panels, for multiply_panel: the panel at d begins at d * kSteps
// and holds steps of all its columns. row(i) is row i; where null, and behind the last, zeros.
template <class Operand, int kMaxVecs, int kSteps, class Row>
void pack_panels(typename Operand::Number* to, int64_t D, int rows, Row row) {
  constexpr int kLanes = Operand::Lanes::kLanes;
  for (int step = 0; step < steps_of<Operand>(rows); ++step) {
    const typename Operand::Element* from[Operand::kDepth];
    for (int i = 0; i < Operand::kDepth; ++i) {
      const int index = step * Operand::kDepth + i;
      from[i] = index < rows ? row(index) : nullptr;
    }
    for_each_panel<kLanes, kMaxVecs>(D, [&](auto vecs, int64_t d) {
      const typename Operand::Element* columns[Operand::kDepth];
      for (int i = 0; i < Operand::kDepth; ++i) columns[i] = from[i] ? from[i] + d : nullptr;
      constexpr int64_t kWidth = decltype(vecs)::value * kLanes;
      pack_columns<Operand>(to + d * kSteps + step * kWidth, columns,
                            D - d < kWidth ? D - d : kWidth);
    });
  }
}

// out[row] = sum over steps of a[row][step] * b[step], or that added to out[row] if kAdd; for kVecs
// vectors of every row. a has the strides given; b is a panel as packed above.
template <class Operand, int kRows, int kVecs, int kRowStride, int kStepStride, bool kAdd>
  requires TakesSingleSteps<Operand>
void multiply_panel(typename Operand::Real* out, int64_t out_stride,
                    const typename Operand::Number* a, const typename Operand::Number* b,
                    int64_t steps) {
  using Lanes = typename Operand::Lanes;
  using Sums = typename Operand::Sums;
  typename Sums::Vec sum[kRows][kVecs] = {};
  for (int64_t step = 0; step < steps; ++step, a += kStepStride, b += kVecs * Lanes::kLanes) {
    typename Lanes::Vec right[kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) right[i] = Lanes::load(b + i * Lanes::kLanes);
    add_step<Operand>(sum, [&](int row) { return a[row * kRowStride]; }, right);
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      auto* o = out + row * out_stride + i * Sums::kLanes;
      Sums::store(kAdd ? Sums::load(o) + sum[row][i] : sum[row][i], o);
    }
  }
}

// Calls visit(d, a) with kLanes numbers each of `rows` from column d on, widened; behind column D
// they are zeros.
template <class Lanes, class Element, int kRows, class Visit>
void for_each_vector(const Element* const (&rows)[kRows], int64_t D, Visit visit) {
  using Vec = typename Lanes::Vec;
  struct Vecs {
    Vec of[kRows];
  };
  const auto load = [](const auto& from) {
    Vecs vecs;
    for (int i = 0; i < kRows; ++i) vecs.of[i] = Lanes::load(from[i]);
    return vecs;
  };
  for (int64_t d = 0; d < D; d += Lanes::kLanes) {
    const Element* from[kRows];
    for (int i = 0; i < kRows; ++i) from[i] = rows[i] + d;
    const Vecs vecs =
        D - d >= Lanes::kLanes ? load(from) : load_first<Lanes::kLanes>(from, D - d, load);
    visit(d, vecs.of);
  }
}

// to += weight * row; to holds whole vectors.
template <class Lanes, class Real, class Element>
void add_row(Real* to, Real weight, const Element* row, int64_t D) {
  const Element* const rows[] = {row};
  for_each_vector<Lanes>(rows, D, [&](int64_t d, const auto& v) {
    Lanes::store(Lanes::load(to + d) + Lanes::splat(weight) * v[0], to + d);
  });
}

// The first of `elements` elements that are left of a row.
template <class Lanes, class Element>
void store_some(typename Lanes::Vec v, Element* to, int64_t elements) {
  if (elements >= Lanes::kLanes) {
    Lanes::store(v, to);
  } else {
    Lanes::store_first(v, to, elements);
  }
}

}  // namespace online_attention::cpu
