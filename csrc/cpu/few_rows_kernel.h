// SPDX-License-Identifier: BSD-3-Clause
// The products of few query rows with keys and values that are read where they lie: no packing pays
// for so few, and memory sets the pace. While one matrix is worked on, the rows that come next are
// asked for, so that the processor never stops reading.
#pragma once

#include "core/mask.h"
#include "cpu/micro_kernel.h"
#include "cpu/rows_ahead.h"

namespace online_attention::cpu {

// Of kRows rows, so many vectors of each fit into the registers for sums.
template <class Isa, int kRows>
constexpr int vecs_beside_rows(int most) {
  int vecs = most;
  while (vecs > 1 && vecs * kRows > Isa::kBlockRows * Isa::kBlockVecs) vecs /= 2;
  return vecs;
}

// parts[row][at + i] := the products of the row with keys[i], to be folded.
template <class Operand, int kRows, int kKeys>
[[gnu::always_inline]] inline void dot_some_keys(
    typename Operand::Sums::Vec (&parts)[kRows][Operand::Lanes::kLanes], int at,
    const typename Operand::Number* q, int64_t q_stride, int64_t D,
    const typename Operand::Element* const (&keys)[kKeys]) {
  using Lanes = typename Operand::Lanes;
  constexpr int kDims = Lanes::kLanes * Operand::kDepth;
  typename Operand::Sums::Vec sum[kRows][kKeys] = {};
  for (int64_t d = 0; d < D; d += kDims, q += Lanes::kLanes) {
    typename Operand::Vec k[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) k[i] = load_some_steps<Operand>(keys[i] + d, D - d);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const auto query = Lanes::load(q + row * q_stride);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) sum[row][i] = Operand::multiply_add(sum[row][i], query, k[i]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) parts[row][at + i] = sum[row][i];
  }
}

// scores[row][i] = sign * <q_row, key(i)>, for `count` keys, and zeros behind them up to a whole
// vector; scores has rows of kStride numbers. q is [kRows][q_stride], in steps and with zeros
// behind D. For each key a row of `ahead` is fetched.
template <class Isa, class Operand, int kRows, int kStride, class Key>
void dot_queries_keys(typename Operand::Real* scores, const typename Operand::Number* q,
                      int64_t q_stride, int64_t D, int count, Key key, typename Operand::Real sign,
                      const RowsAhead<typename Operand::Element>& ahead = {}) {
  using Element = typename Operand::Element;
  using Sums = typename Operand::Sums;
  constexpr int kLanes = Operand::Lanes::kLanes;
  constexpr int kTogether = vecs_beside_rows<Isa, kRows>(kLanes < 4 ? kLanes : 4);
  for (int first = 0; first < count; first += kLanes) {
    typename Sums::Vec parts[kRows][kLanes];
    const int here = count - first < kLanes ? count - first : kLanes;
    int i = 0;
    for (; i + kTogether <= here; i += kTogether) {
      const Element* keys[kTogether];
#pragma GCC unroll 16
      for (int j = 0; j < kTogether; ++j) {
        keys[j] = key(first + i + j);
        ahead.fetch(first + i + j, 0, ahead.elements);
      }
      dot_some_keys<Operand>(parts, i, q, q_stride, D, keys);
    }
    for (; i < here; ++i) {
      const Element* const keys[] = {key(first + i)};
      dot_some_keys<Operand>(parts, i, q, q_stride, D, keys);
    }
    for (; i < kLanes; ++i) {
      for (int row = 0; row < kRows; ++row) parts[row][i] = typename Sums::Vec{};
    }
    for (int row = 0; row < kRows; ++row) {
      // In pairs: each product passes log2(kLanes) roundings here.
      const auto sums = Sums::sum_of_rows(parts[row]);
      Sums::store(sums * Sums::splat(sign), scores + row * kStride + first);
    }
  }
}

// Values where they lie: `count` rows of D_v elements, a multiple of the lanes.
template <class Element>
struct ValueRows {
  const Element* first;
  int64_t stride;  // elements from one row to the next
  int32_t count;
};

// sum[row] += p[row] * the values of one step, where they lie.
template <class Operand, int kStride, int kRows, int kVecs>
[[gnu::always_inline]] inline void add_value_step(
    typename Operand::Sums::Vec (&sum)[kRows][kVecs], const typename Operand::Weight* p,
    const typename Operand::Element* const (&rows)[Operand::kDepth]) {
  typename Operand::Vec value[kVecs];
  Operand::load_columns(rows, value);
  add_step<Operand>(sum, [&](int row) { return Operand::weights(p + row * kStride); }, value);
}

// out[row] = alpha[row] * out[row] + sum over keys of p[row][key] * v[key], for kVecs vectors of
// columns from `d` on; sums as those of add_some_values.
template <class Operand, int kRows, int kVecs, int kStride, int kPart>
void add_some_columns(typename Operand::Real* out, int64_t out_stride,
                      const typename Operand::Real* alpha, const typename Operand::Weight* p,
                      const ValueRows<typename Operand::Element>& v, int64_t d, KvRange steps,
                      const RowsAhead<typename Operand::Element>& ahead) {
  using Element = typename Operand::Element;
  using Sums = typename Operand::Sums;
  constexpr int kDepth = Operand::kDepth;
  constexpr int kColumns = kVecs * Sums::kLanes;
  static constexpr Element kZeros[kColumns] = {};
  const auto add = [&](typename Sums::Vec(&sum)[kRows][kVecs],
                       KvRange part) __attribute__((always_inline)) {
    const int32_t whole = v.count / kDepth < part.end ? v.count / kDepth : part.end;
    const Element* rows[kDepth];
    for (int32_t step = part.begin; step < whole; ++step) {
#pragma GCC unroll 2
      for (int i = 0; i < kDepth; ++i) {
        rows[i] = v.first + (step * kDepth + i) * v.stride + d;
        ahead.fetch(step * kDepth + i, d, d + kColumns);
      }
      add_value_step<Operand, kStride>(sum, p + step * kDepth, rows);
    }
    if (whole == part.end) return;
    for (int i = 0; i < kDepth; ++i) {
      const int32_t key = whole * kDepth + i;
      rows[i] = key < v.count ? v.first + key * v.stride + d : kZeros;
    }
    add_value_step<Operand, kStride>(sum, p + whole * kDepth, rows);
  };
  typename Sums::Vec sum[kRows][kVecs] = {};
  if constexpr (kPart == kStride) {
    add(sum, steps);
  } else {
    for (int32_t begin = steps.begin; begin < steps.end;) {
      const int32_t part_end = begin - begin % kPart + kPart;
      const int32_t end = part_end < steps.end ? part_end : steps.end;
      typename Sums::Vec part[kRows][kVecs] = {};
      add(part, {begin, end});
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
      auto* o = out + row * out_stride + d + i * Sums::kLanes;
      Sums::store(Sums::load(o) * Sums::splat(alpha[row]) + sum[row][i], o);
    }
  }
}

// The same for all D_v columns.
template <class Isa, class Operand, int kRows, int kStride, int kPart>
void add_values_in_place(typename Operand::Real* out, int64_t out_stride,
                         const typename Operand::Real* alpha, const typename Operand::Weight* p,
                         const ValueRows<typename Operand::Element>& v, int64_t D_v, KvRange steps,
                         const RowsAhead<typename Operand::Element>& ahead) {
  constexpr int kLanes = Operand::Lanes::kLanes;
  constexpr int kVecs = vecs_beside_rows<Isa, kRows>(8);
  int64_t d = 0;
  for (; d + kVecs * kLanes <= D_v; d += kVecs * kLanes) {
    add_some_columns<Operand, kRows, kVecs, kStride, kPart>(out, out_stride, alpha, p, v, d, steps,
                                                            ahead);
  }
  for (; d < D_v; d += kLanes) {
    add_some_columns<Operand, kRows, 1, kStride, kPart>(out, out_stride, alpha, p, v, d, steps,
                                                        ahead);
  }
}

}  // namespace online_attention::cpu
