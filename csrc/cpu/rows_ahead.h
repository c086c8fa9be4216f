// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

namespace online_attention::cpu {

// Rows that are worked on next: one is asked of memory for each that is worked on now.
template <class Element>
struct RowsAhead {
  const Element* first = nullptr;
  int64_t stride = 0, elements = 0;  // from one row to the next, and of a row
  int32_t count = 0;
  int32_t next = 0;  // of fetch_more

  void fetch(int32_t row, int64_t begin, int64_t end) const {
    constexpr int kLine = 64 / static_cast<int>(sizeof(Element));
    constexpr int kIntoL2 = 2;
    if (row >= count) return;
    const Element* elements_of_row = first + row * stride;
    for (int64_t i = begin; i < (end < elements ? end : elements); i += kLine) {
      __builtin_prefetch(elements_of_row + i, 0, kIntoL2);
    }
  }

  // The next few rows.
  void fetch_more(int rows) {
    for (int i = 0; i < rows && next < count; ++i, ++next) fetch(next, 0, elements);
  }
};

}  // namespace online_attention::cpu
