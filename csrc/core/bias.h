// SPDX-License-Identifier: BSD-3-Clause
// What a caller adds to the scores, or hides them by: one element for each pair of a query and a
// key, read where it lies.
#pragma once

#include "core/hd.h"

namespace online_attention {

enum class BiasType : int8_t {
  none,
  boolean,  // one byte; a pair whose element is 0 is hidden
  element,  // of the dtype of q; added to the score in natural units, and -inf hides the pair
  f32,      // as `element`, in single precision
};

// [B, H, S_q, S_kv], broadcast: dimensions of size 1 have stride 0. Strides count elements and may
// be anything. Heads are those of the queries.
struct Bias {
  BiasType type = BiasType::none;
  const void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_q = 0, stride_kv = 0;

  ONLINE_ATTENTION_HD bool exists() const { return type != BiasType::none; }
  // Of one element, for queries whose elements have `q_bytes`.
  constexpr int64_t element_bytes(int64_t q_bytes) const {
    return type == BiasType::boolean ? 1 : type == BiasType::f32 ? 4 : q_bytes;
  }

  // The elements of one query, stride_kv apart; Element is the type that `type` stands for.
  template <typename Element>
  ONLINE_ATTENTION_HD const Element* row(int64_t b, int64_t h, int64_t q_idx) const {
    return static_cast<const Element*>(data) + b * stride_b + h * stride_h + q_idx * stride_q;
  }
};

}  // namespace online_attention
