// SPDX-License-Identifier: BSD-3-Clause
// Which tensors the copy engine (TMA) can address.
#pragma once

#include "core/problem.h"

namespace online_attention::cuda::hopper {

// [B, H, S, D] of 16-bit elements: rows, heads and batches on 16-byte boundaries; heads and batches
// may be broadcast. A dimension of size 1 has no stride that matters; but a batch of one must be
// judged as the batch it may have been cut from, if that is to change nothing.
inline bool is_addressable(const View& view, int64_t B, int64_t H, int64_t S, int64_t D,
                           bool strides_of_one_matter = false) {
  constexpr int64_t kBytes = 2, kUnit = 16, kStrideEnd = int64_t{1} << 40;
  const auto takes = [&](int64_t size, int64_t stride, bool may_be_zero) {
    if (size <= 1 && !strides_of_one_matter) return true;
    if (stride == 0) return may_be_zero;
    return stride > 0 && stride < kStrideEnd / kBytes && stride * kBytes % kUnit == 0;
  };
  return reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 && D % 8 == 0 &&
         takes(B, view.stride_b, true) && takes(H, view.stride_h, true) &&
         takes(S, view.stride_s, false);
}

}  // namespace online_attention::cuda::hopper
