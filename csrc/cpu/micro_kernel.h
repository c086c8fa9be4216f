// SPDX-License-Identifier: BSD-3-Clause
// The two matrix products and the packing they need. A micro-kernel keeps kRows x kVecs vectors of
// sums in registers, and each step adds the product of kRows broadcast numbers and kVecs vectors.
#pragma once

#include "cpu/simd.h"

namespace online_attention::cpu {

// to[d][column] = row(column)[d], for `valid` rows of D elements; zeros for the columns behind them
// up to kColumns. May write up to a vector more than D * kColumns numbers.
template <class Simd, int kColumns, class Real, class Row>
void pack_transposed(Real* to, int64_t D, int valid, Row row) {
  constexpr int kLanes = Simd::kLanes;
  constexpr int kParts = (kColumns + kLanes - 1) / kLanes;
  for (int64_t d_begin = 0; d_begin < D; d_begin += kLanes) {
    const int64_t dims = D - d_begin < kLanes ? D - d_begin : kLanes;
    typename Simd::Vec block[kParts][kLanes];
    for (int part = 0; part < kParts; ++part) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int column = part * kLanes + lane;
        if (column >= kColumns || column >= valid) {
          block[part][lane] = typename Simd::Vec{};
        } else if (dims == kLanes) {
          block[part][lane] = Simd::load(row(column) + d_begin);
        } else {
          block[part][lane] = Simd::load_first(row(column) + d_begin, dims);
        }
      }
      Simd::transpose(block[part]);
    }
    // In ascending order: what a store writes too much, the next one overwrites.
    for (int64_t i = 0; i < dims; ++i) {
      for (int part = 0; part < kParts; ++part) {
        Simd::store(block[part][i], to + (d_begin + i) * kColumns + part * kLanes);
      }
    }
  }
}

// scores[row][column] = sign * <q_row, k_column>, for q [D][kRows] and k [D][kVecs * kLanes] as
// packed above; scores has rows of kStride numbers.
template <class Simd, int kRows, int kVecs, int kStride, class Real>
void multiply_queries_keys(Real* scores, const Real* q, const Real* k, int64_t D, Real sign) {
  using Vec = typename Simd::Vec;
  Vec sum[kRows][kVecs] = {};
  for (int64_t d = 0; d < D; ++d, q += kRows, k += kVecs * Simd::kLanes) {
    Vec key[kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) key[i] = Simd::load(k + i * Simd::kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec query = Simd::splat(q[row]);
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) sum[row][i] += query * key[i];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      Simd::store(sum[row][i] * Simd::splat(sign), scores + row * kStride + i * Simd::kLanes);
    }
  }
}

// out[row] = alpha[row] * out[row] + sum over `keys` of p[row][key] * v[key], for kVecs vectors of
// every row; p has rows of kStride numbers. The tile is summed apart from what came before, so that
// rounding errors grow with the number of tiles, not of keys.
template <class Simd, int kRows, int kVecs, int kStride, class Real>
void add_values(Real* out, int64_t out_stride, const Real* alpha, const Real* p, const Real* v,
                int64_t v_stride, int keys) {
  using Vec = typename Simd::Vec;
  Vec sum[kRows][kVecs] = {};
  for (int key = 0; key < keys; ++key, v += v_stride) {
    Vec value[kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) value[i] = Simd::load(v + i * Simd::kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec weight = Simd::splat(p[row * kStride + key]);
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) sum[row][i] += weight * value[i];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      Real* o = out + row * out_stride + i * Simd::kLanes;
      Simd::store(Simd::load(o) * Simd::splat(alpha[row]) + sum[row][i], o);
    }
  }
}

}  // namespace online_attention::cpu
