// SPDX-License-Identifier: BSD-3-Clause
// What forward.cpp and backward.cpp hand to their kernels of a call's bias and dropout. Not for the
// files of the instruction sets; see query_tile.h.
#pragma once

#include <cstddef>
#include <cstring>

#include "cpu/query_tile.h"

namespace online_attention::cpu {

// The bias of one query's first key.
inline const void* bias_row(const Bias& bias, DType dtype, int64_t b, int64_t h, int64_t q_idx) {
  const int64_t element = b * bias.stride_b + h * bias.stride_h + q_idx * bias.stride_q;
  return static_cast<const std::byte*>(bias.data) +
         element * bias.element_bytes(element_bytes(dtype));
}

// `range` without the keys at its ends that a boolean bias hides: padding then costs nothing. Only
// where its elements lie side by side.
inline KvRange without_hidden_ends(const Bias& bias, const void* row, KvRange range) {
  if (bias.type != BiasType::boolean || bias.stride_kv != 1) return range;
  const auto* shown = static_cast<const uint8_t*>(row);
  constexpr int32_t kBytes = 8;
  const auto all_hidden = [&](int32_t begin) {
    uint64_t bytes;
    std::memcpy(&bytes, shown + begin, kBytes);
    return bytes == 0;
  };
  while (range.size() >= kBytes && all_hidden(range.begin)) range.begin += kBytes;
  while (range.size() > 0 && shown[range.begin] == 0) ++range.begin;
  while (range.size() >= kBytes && all_hidden(range.end - kBytes)) range.end -= kBytes;
  while (range.size() > 0 && shown[range.end - 1] == 0) --range.end;
  return range.size() > 0 ? range : KvRange{};
}

inline DropoutState dropout_state(const Dropout& dropout) {
  if (!dropout.exists()) return {};
  return {true, dropout.state[0], static_cast<uint32_t>(dropout.state[1]),
          static_cast<int32_t>(dropout.threshold), dropout.keep_scale<double>()};
}

}  // namespace online_attention::cpu
