// SPDX-License-Identifier: BSD-3-Clause
// Keys and values that are asked of memory before they are worked on, a few at a time: a core drops
// what it has no buffer for.
#pragma once

#include "core/mask.h"

namespace online_attention::cpu {

// Rows of a matrix in the caller's memory.
template <class Element>
struct RowsAhead {
  const Element* first = nullptr;
  int64_t stride = 0, elements = 0;  // from one row to the next, and of a row
  int32_t count = 0;

  static RowsAhead of(const void* matrix, int64_t stride, int64_t elements, KvRange rows) {
    return {static_cast<const Element*>(matrix) + rows.begin * stride, stride, elements,
            rows.size()};
  }

  // The elements [begin, end) of one row, if there is such a row.
  void fetch(int32_t row, int64_t begin, int64_t end) const {
    constexpr int kLine = 64 / static_cast<int>(sizeof(Element));
    constexpr int kIntoL2 = 2;
    if (row >= count) return;
    const Element* elements_of_row = first + row * stride;
    for (int64_t i = begin; i < (end < elements ? end : elements); i += kLine) {
      __builtin_prefetch(elements_of_row + i, 0, kIntoL2);
    }
  }
};

// The keys and values of the tile that follows, while the rows work on one.
template <class Element>
class NextTile {
 public:
  NextTile() = default;
  // All keys are fetched when fetch_keys has been called so many times.
  NextTile(RowsAhead<Element> keys, RowsAhead<Element> values, int tile_keys, int calls)
      : keys_(keys), values_(values), keys_at_once_((tile_keys + calls - 1) / calls) {}

  void fetch_keys() {
    for (int i = 0; i < keys_at_once_; ++i) keys_.fetch(next_key_++, 0, keys_.elements);
  }
  void fetch_value() { values_.fetch(next_value_++, 0, values_.elements); }

 private:
  RowsAhead<Element> keys_, values_;
  int keys_at_once_ = 0;
  int32_t next_key_ = 0, next_value_ = 0;
};

}  // namespace online_attention::cpu
