// SPDX-License-Identifier: BSD-3-Clause
// Which tiles a mask does not cut: pairs of a band that are all visible.
#pragma once

#include "core/mask.h"

namespace online_attention::cuda::hopper {

// The keys that all queries of [q_begin, q_end) see.
__device__ __forceinline__ KvRange seen_by_all(const Mask& mask, int32_t q_begin, int32_t q_end) {
  const int64_t none = Mask::kUnbounded;
  const int64_t begin =
      mask.diagonal_min == -Mask::kUnbounded ? 0 : int64_t{q_end} - 1 + mask.diagonal_min;
  const int64_t end =
      mask.diagonal_max == Mask::kUnbounded ? none : q_begin + int64_t{1} + mask.diagonal_max;
  return {static_cast<int32_t>(min(max(begin, int64_t{0}), none)),
          static_cast<int32_t>(max(min(end, int64_t{mask.s_kv}), int64_t{0}))};
}

// The queries that see all keys of [kv_begin, kv_end).
__device__ __forceinline__ QRange queries_of_all(const Mask& mask, int32_t kv_begin,
                                                 int32_t kv_end) {
  if (kv_end > mask.s_kv) return {0, 0};
  constexpr int64_t kNone = Mask::kUnbounded;
  const int64_t begin =
      mask.diagonal_max == Mask::kUnbounded ? 0 : int64_t{kv_end} - 1 - mask.diagonal_max;
  const int64_t end =
      mask.diagonal_min == -Mask::kUnbounded ? kNone : kv_begin + int64_t{1} - mask.diagonal_min;
  return {static_cast<int32_t>(min(max(begin, int64_t{0}), kNone)),
          static_cast<int32_t>(max(min(end, kNone), int64_t{0}))};
}

}  // namespace online_attention::cuda::hopper
