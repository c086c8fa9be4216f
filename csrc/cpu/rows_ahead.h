// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "cpu/gradient_tile.h"

namespace online_attention::cpu {

// Rows that are worked on next: one is asked of memory for each that is worked on now.
template <class Element>
struct RowsAhead {
  const Element* first = nullptr;
  int64_t stride = 0, elements = 0;  // from one row to the next, and of a row
  int32_t count = 0;

  void fetch(int32_t row, int64_t begin, int64_t end) const {
    constexpr int kLine = 64 / static_cast<int>(sizeof(Element));
    constexpr int kIntoL2 = 2;
    if (row >= count) return;
    const Element* elements_of_row = first + row * stride;
    for (int64_t i = begin; i < (end < elements ? end : elements); i += kLine) {
      __builtin_prefetch(elements_of_row + i, 0, kIntoL2);
    }
  }

  // The next few rows, where `next` says how far that has come.
  void fetch_some(int32_t rows, int32_t& next) const {
    for (int32_t i = 0; i < rows && next < count; ++i, ++next) fetch(next, 0, elements);
  }
};

// While rows work on one tile, the keys and values of the next come nearer, a few at a time: a core
// drops what it has no buffer for.
template <class Element>
class TileAhead {
 public:
  // `keys`, at most tile_keys of them, are next.
  void begin(const QueryTile& tile, KvRange keys, int tile_keys) {
    const auto rows = [&](const void* matrix, int64_t stride, int64_t elements) {
      return RowsAhead<Element>{static_cast<const Element*>(matrix) + keys.begin * stride, stride,
                                elements, keys.size()};
    };
    keys_ = rows(tile.k, tile.k_stride, tile.D);
    values_ = rows(tile.v, tile.v_stride, tile.D_v);
    pairs_a_key_ = tile.rows;
    values_a_row_ = (tile_keys + tile.rows - 1) / tile.rows;
    next_key_ = next_value_ = 0;
  }

  // Before so many pairs of the present tile are multiplied.
  void fetch_keys(int pairs) {
    keys_.fetch_some((pairs + pairs_a_key_ - 1) / pairs_a_key_, next_key_);
  }
  // Before one row is weighed.
  void fetch_values() { values_.fetch_some(values_a_row_, next_value_); }

 private:
  RowsAhead<Element> keys_, values_;
  int pairs_a_key_ = 1, values_a_row_ = 0;
  int32_t next_key_ = 0, next_value_ = 0;
};

// While the rows of one set work in cells, what is needed of memory next comes nearer, a few rows
// at a time: their own sums of dq, and q and dout of the next set.
template <class Isa, class Element>
class SetAhead {
 public:
  SetAhead(const KeyTile& tile, const QueryRows& rows, const QueryRows* next, int cell_keys,
           int cell_rows)
      : tile_(tile), rows_(rows), next_(next) {
    const int panels = (tile.keys.end - tile.keys.begin + cell_keys - 1) / cell_keys;
    rows_a_cell_ = (cell_rows + panels - 1) / panels;
  }

  // Before one cell.
  void fetch_some() {
    for (int end = row_ + rows_a_cell_; row_ < end; ++row_) {
      if (tile_.wants_dq && row_ < rows_.rows) fetch(rows_.dq_sum[row_], tile_.D * kRealBytes);
      if (next_ == nullptr || row_ >= next_->rows) continue;
      fetch(next_->q[row_], tile_.D * kElementBytes);
      fetch(next_->dout[row_], tile_.D_v * kElementBytes);
    }
  }

 private:
  static constexpr int64_t kElementBytes = sizeof(Element), kRealBytes = sizeof(RealOf<Element>);

  static void fetch(const void* row, int64_t bytes) {
    constexpr int kLine = 64, kIntoL2 = 2;
    for (int64_t i = 0; i < bytes; i += kLine) {
      __builtin_prefetch(static_cast<const char*>(row) + i, 0, kIntoL2);
    }
  }

  const KeyTile& tile_;
  const QueryRows& rows_;
  const QueryRows* const next_;
  int rows_a_cell_ = 0, row_ = 0;
};

}  // namespace online_attention::cpu
