// SPDX-License-Identifier: BSD-3-Clause
// The two matrix products and the packing they need. A micro-kernel keeps kRows x kVecs vectors of
// sums in registers, and each step multiplies kRows broadcast numbers by kVecs vectors.
#pragma once

#include "cpu/operand.h"

namespace online_attention::cpu {

template <class Operand>
constexpr int64_t steps_of(int64_t elements) {
  return (elements + Operand::kDepth - 1) / Operand::kDepth;
}

// to[step][column] = row(column)[step], for `valid` rows of D elements; zeros for the columns
// behind them up to kColumns. May write up to a vector more than it has to.
template <class Operand, int kColumns, class Row>
void pack_transposed(typename Operand::Number* to, int64_t D, int valid, Row row) {
  using Element = typename Operand::Element;
  using Lanes = typename Operand::Lanes;
  constexpr int kLanes = Lanes::kLanes;
  constexpr int kParts = (kColumns + kLanes - 1) / kLanes;
  constexpr int kDims = kLanes * Operand::kDepth;
  for (int64_t d_begin = 0; d_begin < D; d_begin += kDims) {
    const int64_t dims = D - d_begin < kDims ? D - d_begin : kDims;
    typename Lanes::Vec block[kParts][kLanes];
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int column = part * kLanes + lane;
        if (column >= kColumns || column >= valid) {
          block[part][lane] = typename Lanes::Vec{};
        } else if (dims == kDims) {
          block[part][lane] = Operand::load_steps(row(column) + d_begin);
        } else {
          const Element* const rows[1] = {row(column) + d_begin};
          block[part][lane] = load_first<kDims>(
              rows, dims, [](const auto& padded) { return Operand::load_steps(padded[0]); });
        }
      }
      Lanes::transpose(block[part]);
    }
    // In ascending order: what a store writes too much, the next one overwrites.
    for (int64_t i = 0; i < steps_of<Operand>(dims); ++i) {
      for (int part = 0; part < kParts; ++part, to += kLanes) Lanes::store(block[part][i], to);
      to += kColumns - kParts * kLanes;
    }
  }
}

// Longer dot products are sums of parts of this length, to keep rounding errors small.
inline constexpr int64_t kStepsSummed = 128;

// scores[row][column] = sign * <q_row, k_column>, for q [steps][kRows] and k [steps][kVecs *
// kLanes] as packed above; scores has rows of kStride numbers.
template <class Operand, int kRows, int kVecs, int kStride>
void multiply_queries_keys(typename Operand::Real* scores, const typename Operand::Number* q,
                           const typename Operand::Number* k, int64_t steps,
                           typename Operand::Real sign) {
  using Lanes = typename Operand::Lanes;
  using Sums = typename Operand::Sums;
  for (int64_t begin = 0; begin == 0 || begin < steps; begin += kStepsSummed) {
    const int64_t end = steps - begin < kStepsSummed ? steps : begin + kStepsSummed;
    typename Sums::Vec sum[kRows][kVecs] = {};
    for (int64_t step = begin; step < end; ++step, q += kRows, k += kVecs * Lanes::kLanes) {
      typename Lanes::Vec key[kVecs];
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) key[i] = Lanes::load(k + i * Lanes::kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const auto query = Lanes::splat(q[row]);
#pragma GCC unroll 16
        for (int i = 0; i < kVecs; ++i) {
          sum[row][i] = Operand::multiply_add(sum[row][i], query, key[i]);
        }
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) {
        auto* s = scores + row * kStride + i * Sums::kLanes;
        const auto signed_sum = sum[row][i] * Sums::splat(sign);
        Sums::store(begin == 0 ? signed_sum : Sums::load(s) + signed_sum, s);
      }
    }
  }
}

// out[row] = alpha[row] * out[row] + sum over keys of p[row][key] * v[key], for kVecs vectors of
// every row; p has rows of kStride weights, v [steps][v_stride] as packed by the caller. The tile
// is summed apart from what came before, so that rounding errors grow with the number of tiles, not
// of keys.
template <class Operand, int kRows, int kVecs, int kStride>
void add_values(typename Operand::Real* out, int64_t out_stride,
                const typename Operand::Real* alpha, const typename Operand::Weight* p,
                const typename Operand::Number* v, int64_t v_stride, int64_t steps) {
  using Lanes = typename Operand::Lanes;
  using Sums = typename Operand::Sums;
  typename Sums::Vec sum[kRows][kVecs] = {};
  for (int64_t step = 0; step < steps; ++step, p += Operand::kDepth, v += v_stride) {
    typename Lanes::Vec value[kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) value[i] = Lanes::load(v + i * Lanes::kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const auto weights = Lanes::splat(Operand::weights(p + row * kStride));
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) {
        sum[row][i] = Operand::multiply_add(sum[row][i], weights, value[i]);
      }
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

}  // namespace online_attention::cpu
