// SPDX-License-Identifier: BSD-3-Clause
// The scores of some query rows with keys that are read where they lie, for more rows than
// dot_queries_keys is fast for. Each row has a lane of its own and each step multiplies one number
// of a key by a vector of them, so that nothing is folded across lanes.
#pragma once

#include <type_traits>

#include "cpu/few_rows_kernel.h"
#include "cpu/query_tile.h"

namespace online_attention::cpu {

// sum[key] += <q_row, key> over the elements [begin, end), for kVecs vectors of rows; q is
// [D][kColumns], a column for each row.
template <class Operand, int kColumns, int kKeys, int kVecs>
[[gnu::always_inline]] inline void add_keys_times_lanes(
    typename Operand::Sums::Vec (&sum)[kKeys][kVecs], const typename Operand::Number* q,
    const typename Operand::Element* const (&keys)[kKeys], int64_t begin, int64_t end) {
  using Lanes = typename Operand::Lanes;
  constexpr int kSteps = kVecs == 1 ? 4 : 2;  // at a time: the registers that sums leave
  const auto add = [&]<int kCount>(std::integral_constant<int, kCount>,
                                   int64_t d) __attribute__((always_inline)) {
    typename Operand::Vec query[kCount][kVecs];
#pragma GCC unroll 16
    for (int step = 0; step < kCount; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) {
        query[step][i] = Lanes::load(q + (d + step) * kColumns + i * Lanes::kLanes);
      }
    }
#pragma GCC unroll 16
    for (int key = 0; key < kKeys; ++key) {
#pragma GCC unroll 16
      for (int step = 0; step < kCount; ++step) {
        const auto factor = Lanes::splat(keys[key][d + step]);
#pragma GCC unroll 16
        for (int i = 0; i < kVecs; ++i) {
          sum[key][i] = Operand::multiply_add(sum[key][i], factor, query[step][i]);
        }
      }
    }
  };
  int64_t d = begin;
  for (; d + kSteps <= end; d += kSteps) add(std::integral_constant<int, kSteps>{}, d);
  for (; d < end; ++d) add(std::integral_constant<int, 1>{}, d);
}

// scores[row][i] = sign * <q_row, key(i)> for `count` keys, and some number behind them up to a
// whole vector; q as above, scores has rows of kStride numbers. Each is summed in the order and the
// parts of multiply_queries_keys: keys that are packed give the same bits. For each key a row of
// `ahead` is fetched.
template <class Isa, class Operand, int kColumns, int kStride, int kPart, class Key>
void dot_keys_queries(typename Operand::Real* scores, const typename Operand::Number* q, int rows,
                      int64_t D, int count, Key key, typename Operand::Real sign,
                      const RowsAhead<typename Operand::Element>& ahead) {
  using Sums = typename Operand::Sums;
  constexpr int kLanes = Sums::kLanes;
  constexpr int kVecs = vecs_beside_rows<Isa, kLanes>(kColumns / kLanes);
  for (int first = 0; first < count; first += kLanes) {
    const typename Operand::Element* keys[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      keys[i] = key(first + i < count ? first + i : count - 1);
      ahead.fetch(first + i, 0, ahead.elements);
    }
    for (int row = 0; row < rows; row += kVecs * kLanes) {
      typename Sums::Vec sum[kLanes][kVecs] = {};
      add_keys_times_lanes<Operand, kColumns>(sum, q + row, keys, 0, D < kPart ? D : kPart);
      for (int64_t begin = kPart; begin < D; begin += kPart) {
        typename Sums::Vec part[kLanes][kVecs] = {};
        const int64_t end = D - begin < kPart ? D : begin + kPart;
        add_keys_times_lanes<Operand, kColumns>(part, q + row, keys, begin, end);
        for (int i = 0; i < kLanes; ++i) {
          for (int vec = 0; vec < kVecs; ++vec) sum[i][vec] += part[i][vec];
        }
      }
#pragma GCC unroll 16
      for (int vec = 0; vec < kVecs; ++vec) {
        typename Sums::Vec block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = sum[i][vec] * Sums::splat(sign);
        Sums::transpose(block);
        auto* s = scores + (row + vec * kLanes) * kStride + first;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) Sums::store(block[i], s + i * kStride);
      }
    }
  }
}

// All rows of a tile, and their scores with one tile of keys; of those alone that are
// QueryTile::in_lanes.
template <class Isa, class Operand, int kTileKeys, int kPart>
class QueriesInLanes {
 public:
  using Element = typename Operand::Element;
  using Real = typename Operand::Real;
  using Number = typename Operand::Number;

  // Of elements as they are multiplied: others would have to be widened one by one.
  static constexpr bool kExist = std::is_same_v<Element, Number>;

  // `q` holds kRows numbers for each element of a row.
  QueriesInLanes(const QueryTile& tile, Number* q) : tile_(tile), q_(q) {
    if (!tile.in_lanes) return;
    pack_transposed<Operand, kRows>(
        q, tile.D, tile.rows, [&](int row) { return static_cast<const Element*>(tile.q[row]); });
  }

  void multiply(KvRange keys) {
    if (!tile_.in_lanes) return;
    const int32_t hidden = tile_.some_row_sees.begin - keys.begin;
    const int32_t begin = hidden > 0 ? hidden / kLanes * kLanes : 0;
    const int32_t first = keys.begin + begin, count = keys.end - first;
    const auto* k = static_cast<const Element*>(tile_.k) + first * tile_.k_stride;
    const auto* v = static_cast<const Element*>(tile_.v) + first * tile_.v_stride;
    dot_keys_queries<Isa, Operand, kRows, kTileKeys, kPart>(
        scores_ + begin, q_, tile_.rows, tile_.D, count,
        [&](int i) { return k + i * tile_.k_stride; }, static_cast<Real>(tile_.sign),
        RowsAhead<Element>{v, tile_.v_stride, tile_.D_v, count});
  }

  // [rows][kTileKeys]; may be overwritten.
  Real* scores(int row) { return scores_ + row * kTileKeys; }

 private:
  static constexpr int kLanes = Operand::Lanes::kLanes;
  static constexpr int kRows = QueryTile::kFewRows;
  static_assert(kRows % kLanes == 0);

  const QueryTile& tile_;
  const Number* const q_;
  alignas(64) Real scores_[kExist ? kRows * kTileKeys : 1];
};

}  // namespace online_attention::cpu
