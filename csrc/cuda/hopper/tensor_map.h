// SPDX-License-Identifier: BSD-3-Clause
// Describing a tensor to the copy engine (TMA).
#pragma once

#include "core/launch.h"
#include "cuda/hopper/call.h"

namespace online_attention::cuda::hopper {

struct TensorSizes {
  int64_t B, H, S, D;
};

// Boxes of `box_rows` rows and 64 columns of 16-bit elements, swizzled over 128 bytes; or of fewer
// columns, not swizzled. Takes what runs_forward calls addressable.
Status describe(const View& view, const TensorSizes& sizes, DType dtype, int box_rows,
                TensorBox& box, int columns = 64);

// The same with `pack` heads side by side, [B, H / pack, S, pack, D]: a box has box_rows / pack
// queries of `pack` heads each, in this order of rows.
Status describe_packed(const View& view, const TensorSizes& sizes, DType dtype, int box_rows,
                       int pack, TensorBox& box);

}  // namespace online_attention::cuda::hopper
