// SPDX-License-Identifier: BSD-3-Clause
// The matrix products and the packing they need. A micro-kernel keeps kRows x kVecs vectors of
// sums in registers, and each step multiplies kRows broadcast numbers by kVecs vectors.
#pragma once

#include "core/mask.h"
#include "cpu/operand.h"

namespace online_attention::cpu {

// Of others a file of their own has the products.
template <class Operand>
concept TakesSingleSteps = Operand::kStepsTogether == 1;

// As many as are taken together: there are zeros behind the last that holds an element.
template <class Operand>
constexpr int64_t steps_of(int64_t elements) {
  constexpr int64_t kElements = Operand::kDepth * Operand::kStepsTogether;
  return (elements + kElements - 1) / kElements * Operand::kStepsTogether;
}

// The first of the steps that are taken together with the one that holds `element`.
template <class Operand>
constexpr int32_t first_step_with(int32_t element) {
  constexpr int32_t kElements = Operand::kDepth * Operand::kStepsTogether;
  return element / kElements * Operand::kStepsTogether;
}

// The scores are summed in parts of so many steps. Shared by the passes: the backward pass must
// round scores as the forward pass did.
template <class Isa, class Element>
constexpr int kPartOfScores =
    Isa::kRoundsProducts && sizeof(Element) == sizeof(RealOf<Element>) ? 16 : 128;

// to[step][column] = row(column)[step], for `valid` rows of D elements; zeros for the columns
// behind them. kLanes columns at a time, so that they are transposed in registers.
template <class Operand, int kColumns, class Row>
void pack_transposed(typename Operand::Number* to, int64_t D, int valid, Row row) {
  using Lanes = typename Operand::Lanes;
  constexpr int kLanes = Lanes::kLanes;
  constexpr int kDims = kLanes * Operand::kDepth;
  static_assert(kColumns % kLanes == 0);
  for (int first = 0; first < kColumns; first += kLanes) {
    for (int64_t d = 0; d < D; d += kDims) {
      const int64_t dims = D - d < kDims ? D - d : kDims;
      typename Lanes::Vec block[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        block[lane] = first + lane < valid ? load_some_steps<Operand>(row(first + lane) + d, dims)
                                           : typename Lanes::Vec{};
      }
      Lanes::transpose(block);
      typename Operand::Number* step = to + d / Operand::kDepth * kColumns + first;
      for (int64_t i = 0; i < steps_of<Operand>(dims); ++i, step += kColumns) {
        Lanes::store(block[i], step);
      }
    }
  }
}

// Rows of D elements in chunks of kLanes steps, [chunk][kRows][kLanes], with zeros behind `valid`
// rows and behind D: nothing has to be transposed, and a micro-kernel still finds every row at a
// fixed distance.
template <class Operand, int kRows, class Row>
void pack_chunks(typename Operand::Number* to, int64_t D, int valid, Row row) {
  using Lanes = typename Operand::Lanes;
  constexpr int kDims = Lanes::kLanes * Operand::kDepth;
  for (int64_t d = 0; d < D; d += kDims) {
    for (int i = 0; i < kRows; ++i, to += Lanes::kLanes) {
      Lanes::store(i < valid ? load_some_steps<Operand>(row(i) + d, D - d) : typename Lanes::Vec{},
                   to);
    }
  }
}

// to[i] = row(i) in steps, for `rows` rows of D elements, to_stride steps apart; zeros behind D.
template <class Operand, class Row>
void pack_in_rows(typename Operand::Number* to, int64_t to_stride, int64_t D, int rows, Row row) {
  constexpr int kLanes = Operand::Lanes::kLanes;
  constexpr int kDims = kLanes * Operand::kDepth;
  for (int i = 0; i < rows; ++i) {
    typename Operand::Number* steps = to + i * to_stride;
    for (int64_t d = 0; d < D; d += kDims, steps += kLanes) {
      Operand::Lanes::store(load_some_steps<Operand>(row(i) + d, D - d), steps);
    }
  }
}

// One step of to[step][column] = rows[...][column], for D columns; a null row counts as zeros.
// Writes whole vectors.
template <class Operand>
void pack_columns(typename Operand::Number* to,
                  const typename Operand::Element* const (&rows)[Operand::kDepth], int64_t D) {
  constexpr int kLanes = Operand::Lanes::kLanes;
  static constexpr typename Operand::Element kZeros[kLanes] = {};
  const auto load = [](const auto& columns) { return Operand::load_columns(columns); };
  for (int64_t d = 0; d < D; d += kLanes) {
    const typename Operand::Element* columns[Operand::kDepth];
    for (int i = 0; i < Operand::kDepth; ++i) columns[i] = rows[i] ? rows[i] + d : kZeros;
    const bool whole = D - d >= kLanes;
    Operand::Lanes::store(whole ? load(columns) : load_first<kLanes>(columns, D - d, load), to + d);
  }
}

// The largest of `count` scores, a multiple of the lanes, of each lane. A NaN is passed over, as in
// max_of: it reaches the row through its weight.
template <class Lanes, class Real>
typename Lanes::Vec largest(const Real* s, int count) {
  auto m = Lanes::splat(-kInfinity<Real>);
  for (int n = 0; n < count; n += Lanes::kLanes) m = Lanes::max(Lanes::load(s + n), m);
  return m;
}

// Whether `rows` rows of D elements, row_stride elements apart, hold neither NaN nor infinity.
template <class Lanes, class Element>
bool all_finite(const Element* row, int64_t rows, int64_t row_stride, int64_t D) {
  const auto load = [](const auto& from) { return Lanes::load(from[0]); };
  typename Lanes::Vec zero_or_nan = {};
  for (int64_t i = 0; i < rows; ++i, row += row_stride) {
    for (int64_t d = 0; d < D; d += Lanes::kLanes) {
      const Element* const from[1] = {row + d};
      const bool whole = D - d >= Lanes::kLanes;
      zero_or_nan +=
          (whole ? load(from) : load_first<Lanes::kLanes>(from, D - d, load)) * Lanes::splat(0);
    }
  }
  return Lanes::sum_of_lanes(zero_or_nan) == 0;
}

template <class Lanes, class Element>
bool all_finite(const Element* row, int64_t D) {
  return all_finite<Lanes>(row, 1, 0, D);
}

// sum[row] += left(row) * right, kVecs vectors for each of kRows broadcast numbers.
template <class Operand, int kRows, int kVecs, class Left>
[[gnu::always_inline]] inline void add_step(typename Operand::Sums::Vec (&sum)[kRows][kVecs],
                                            Left left,
                                            const typename Operand::Vec (&right)[kVecs]) {
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const auto factor = Operand::Lanes::splat(left(row));
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      sum[row][i] = Operand::multiply_add(sum[row][i], factor, right[i]);
    }
  }
}

// scores[row][column] = sign * <q_row, k_column> for kVecs vectors of columns, for q in chunks and
// k [steps][kColumns] as packed above; scores has rows of kStride numbers. Each is summed in parts
// of kPart steps, to keep rounding errors small.
template <class Operand, int kRows, int kVecs, int kColumns, int kStride, int kPart>
  requires TakesSingleSteps<Operand>
void multiply_queries_keys(typename Operand::Real* scores, const typename Operand::Number* q,
                           const typename Operand::Number* k, int64_t steps,
                           typename Operand::Real sign) {
  using Lanes = typename Operand::Lanes;
  using Sums = typename Operand::Sums;
  constexpr int kLanes = Lanes::kLanes;
  static_assert(kPart % kLanes == 0);
  for (int64_t begin = 0; begin == 0 || begin < steps; begin += kPart) {
    const int64_t end = steps - begin < kPart ? steps : begin + kPart;
    typename Sums::Vec sum[kRows][kVecs] = {};
    for (int64_t chunk = begin; chunk < end; chunk += kLanes) {
      const int64_t chunk_end = end - chunk < kLanes ? end : chunk + kLanes;
      const typename Operand::Number* left = q + chunk * kRows;
      for (int64_t step = chunk; step < chunk_end; ++step, ++left, k += kColumns) {
        typename Lanes::Vec key[kVecs];
#pragma GCC unroll 16
        for (int i = 0; i < kVecs; ++i) key[i] = Lanes::load(k + i * kLanes);
        add_step<Operand>(sum, [&](int row) { return left[row * kLanes]; }, key);
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) {
        auto* s = scores + row * kStride + i * kLanes;
        const auto signed_sum = sum[row][i] * Sums::splat(sign);
        Sums::store(begin == 0 ? signed_sum : Sums::load(s) + signed_sum, s);
      }
    }
  }
}

// sum[row] += sum over `steps` of p[row][step] * v[step]; see below.
template <class Operand, int kStride, int kRows, int kVecs>
[[gnu::always_inline]] inline void add_products(typename Operand::Sums::Vec (&sum)[kRows][kVecs],
                                                const typename Operand::Weight* p,
                                                const typename Operand::Number* v, int64_t v_stride,
                                                KvRange steps) {
  using Lanes = typename Operand::Lanes;
  p += steps.begin * Operand::kDepth;
  v += steps.begin * v_stride;
  const int64_t count = steps.end - steps.begin;
  for (int64_t step = 0; step < count; ++step, p += Operand::kDepth, v += v_stride) {
    typename Lanes::Vec value[kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) value[i] = Lanes::load(v + i * Lanes::kLanes);
    add_step<Operand>(sum, [&](int row) { return Operand::weights(p + row * kStride); }, value);
  }
}

// out[row] = alpha[row] * out[row] + sum over keys of p[row][key] * v[key], for kVecs vectors of
// every row. p has rows of kStride weights, v [steps of a tile][v_stride] as packed by the caller.
// The tile is summed apart from what came before, so that rounding errors grow with the number of
// tiles, not of keys; and in parts of kPart steps unless that is kStride. Parts begin at multiples
// of kPart, whatever `steps`: hidden keys before and behind those of a row do not move its sums.
template <class Operand, int kRows, int kVecs, int kStride, int kPart>
  requires TakesSingleSteps<Operand>
void add_some_values(typename Operand::Real* out, int64_t out_stride,
                     const typename Operand::Real* alpha, const typename Operand::Weight* p,
                     const typename Operand::Number* v, int64_t v_stride, KvRange steps) {
  using Sums = typename Operand::Sums;
  typename Sums::Vec sum[kRows][kVecs] = {};
  if constexpr (kPart == kStride) {
    add_products<Operand, kStride>(sum, p, v, v_stride, steps);
  } else {
    for (int32_t begin = steps.begin; begin < steps.end;) {
      const int32_t part_end = begin - begin % kPart + kPart;
      const int32_t end = part_end < steps.end ? part_end : steps.end;
      typename Sums::Vec part[kRows][kVecs] = {};
      add_products<Operand, kStride>(part, p, v, v_stride, KvRange{begin, end});
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
        for (int i = 0; i < kVecs; ++i) sum[row][i] += part[row][i];
      }
      begin = end;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      auto* o = out + row * out_stride + i * Sums::kLanes;
      Sums::store(Sums::load(o) * Sums::splat(alpha[row]) + sum[row][i], o);
    }
  }
}

// The same for all out_stride columns, kVecs vectors of them at a time.
template <class Operand, int kRows, int kVecs, int kStride, int kPart>
void add_values(typename Operand::Real* out, int64_t out_stride,
                const typename Operand::Real* alpha, const typename Operand::Weight* p,
                const typename Operand::Number* v, int64_t v_stride, KvRange steps) {
  constexpr int kLanes = Operand::Lanes::kLanes;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= out_stride; d += kVecs * kLanes) {
    add_some_values<Operand, kRows, kVecs, kStride, kPart>(out + d, out_stride, alpha, p, v + d,
                                                           v_stride, steps);
  }
  for (; d < out_stride; d += kLanes) {
    add_some_values<Operand, kRows, 1, kStride, kPart>(out + d, out_stride, alpha, p, v + d,
                                                       v_stride, steps);
  }
}

}  // namespace online_attention::cpu
