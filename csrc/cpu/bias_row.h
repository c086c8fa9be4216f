// SPDX-License-Identifier: BSD-3-Clause
// Not for the files of the instruction sets; see query_tile.h.
#pragma once

#include <cstddef>

#include "core/problem.h"

namespace online_attention::cpu {

// The bias of one query's first key.
inline const void* bias_row(const Bias& bias, DType dtype, int64_t b, int64_t h, int64_t q_idx) {
  const int64_t element = b * bias.stride_b + h * bias.stride_h + q_idx * bias.stride_q;
  const int64_t bytes = bias.type == BiasType::boolean ? 1
                        : bias.type == BiasType::f32   ? 4
                                                       : element_bytes(dtype);
  return static_cast<const std::byte*>(bias.data) + element * bytes;
}

}  // namespace online_attention::cpu
