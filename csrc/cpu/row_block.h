// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/mask.h"

namespace online_attention::cpu {

// Rows [row_begin, row_begin + rows) of a tile, padded to kRows: what a micro-kernel takes at once.
template <int kRows>
struct RowBlock {
  int row_begin, rows;
};

// Of the keys of one tile, those that some row, and those that all rows of a block see.
struct Visibility {
  KvRange by_some, by_all;
};

template <int kRows, int kFewestRows, class Visit>
void visit_last_block(int row, int rows, Visit visit) {
  if constexpr (kRows > kFewestRows) {
    if (rows - row <= kRows / 2) {
      return visit_last_block<kRows / 2, kFewestRows>(row, rows, visit);
    }
  }
  visit(RowBlock<kRows>{row, rows - row});
}

// Calls visit on blocks of kBlockRows of `rows` rows; the last is of half as many, or a quarter,
// ... if that is enough, but not of less than kFewestRows.
template <int kBlockRows, int kFewestRows, class Visit>
void for_each_row_block(int rows, Visit visit) {
  int row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) {
    visit(RowBlock<kBlockRows>{row, kBlockRows});
  }
  if (row < rows) visit_last_block<kBlockRows, kFewestRows>(row, rows, visit);
}

}  // namespace online_attention::cpu
