// SPDX-License-Identifier: BSD-3-Clause
// How stored numbers enter the two matrix products. One step of a micro-kernel adds, to each sum of
// a vector, the products of kDepth pairs of elements: those in one Number of the left operand and
// one Number (lane) of the right operand.
#pragma once

#include <cstddef>

#include "cpu/simd.h"

namespace online_attention::cpu {

// Every element by itself, in the type it is computed in.
template <class Isa, class Stored>
struct Widened {
  using Element = Stored;
  using Real = RealOf<Element>;
  using Number = Real;
  using Weight = Real;              // how p is stored
  using Lanes = Simd<Isa, Number>;  // of numbers
  using Sums = Simd<Isa, Real>;     // of sums, as many lanes
  using Vec = typename Lanes::Vec;
  static constexpr int kDepth = 1;
  static constexpr int kStepsTogether = 1, kFewestRows = 1;  // of a product
  static constexpr bool kMultipliesInPlace = true;           // or the rows are another kernel's

  // kLanes steps along one row.
  static Vec load_steps(const Element* row) { return Lanes::load(row); }
  // One step along kDepth rows, for kLanes columns.
  static Vec load_columns(const Element* const (&rows)[1]) { return Lanes::load(rows[0]); }
  // The same for kVecs vectors of columns.
  template <int kVecs>
  static void load_columns(const Element* const (&rows)[1], Vec (&to)[kVecs]) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) to[i] = Lanes::load(rows[0] + i * Lanes::kLanes);
  }

  static Number weights(const Weight* p) { return *p; }
  static void store_weights(Vec v, Weight* to) { Lanes::store(v, to); }
  static Real widen(Weight p) { return p; }
  // Weights of kDepth rows, for kLanes columns, as one step along the rows.
  static void store_step(const Vec (&rows)[1], Number* step) { Lanes::store(rows[0], step); }
  // The same, and in `columns` as they enter a step along the columns. Here one form is both.
  static void store_step(const Vec (&rows)[1], Number* step, Number* const (&)[1]) {
    store_step(rows, step);
  }
  static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

// `load` of the first `count` elements of each row and zeros behind them. Touches no other memory.
template <int kElements, int kRows, class Element, class Load>
auto load_first(const Element* const (&rows)[kRows], int64_t count, Load load) {
  Element padded[kRows][kElements] = {};
  const Element* padded_rows[kRows];
  for (int i = 0; i < kRows; ++i) {
    __builtin_memcpy(padded[i], rows[i], static_cast<std::size_t>(count) * sizeof(Element));
    padded_rows[i] = padded[i];
  }
  return load(padded_rows);
}

// kLanes steps along a row of which `elements` are left; zeros behind these.
template <class Operand>
typename Operand::Vec load_some_steps(const typename Operand::Element* row, int64_t elements) {
  constexpr int kElements = Operand::Lanes::kLanes * Operand::kDepth;
  if (elements >= kElements) return Operand::load_steps(row);
  const typename Operand::Element* const rows[1] = {row};
  return load_first<kElements>(rows, elements,
                               [](const auto& padded) { return Operand::load_steps(padded[0]); });
}

}  // namespace online_attention::cpu
