// SPDX-License-Identifier: BSD-3-Clause
// Describing a tensor to the copy engine (TMA).
#pragma once

#include "core/launch.h"
#include "cuda/hopper/call.h"

namespace online_attention::cuda::hopper {

struct TensorSizes {
  int64_t B, H, S, D;
};

// Whether the copy engine can address the tensor: rows on 16-byte boundaries, strides neither
// negative nor beyond its 2^40 bytes.
bool is_addressable(const View& view, const TensorSizes& sizes, int64_t element_bytes);

// Boxes of `box_rows` rows and 64 columns of 16-bit elements, swizzled over 128 bytes. Takes what
// is_addressable.
Status describe(const View& view, const TensorSizes& sizes, DType dtype, int box_rows,
                TensorBox& box);

}  // namespace online_attention::cuda::hopper
