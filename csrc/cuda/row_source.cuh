// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

namespace online_attention::cuda {

// The rows a tile is read from. Row r is query (or key) r / pack of head r % pack.
template <typename Element>
struct RowSource {
  const Element* data;  // row 0
  int64_t stride;       // elements, from one query or key to the next
  int64_t stride_head;  // elements, from one head to the next; used if pack > 1
  int32_t pack;
  int32_t rows;    // rows from here on do not exist: read as zeros
  int32_t length;  // nor do elements from here on
  bool aligned;    // rows are readable in 16-byte pieces

  __device__ __forceinline__ const Element* row(int32_t r) const {
    if (pack == 1) return data + r * stride;
    return data + r / pack * stride + r % pack * stride_head;
  }
};

// The rows a tile is written to.
template <typename Element>
struct RowTarget {
  Element* data;   // row 0
  int64_t stride;  // elements, from one row to the next
  int32_t rows;    // rows from here on do not exist
  int32_t length;  // nor do elements from here on
  bool aligned;    // rows are writable in 16-byte pieces
};

}  // namespace online_attention::cuda
