// SPDX-License-Identifier: BSD-3-Clause
// Kernels are compiled for a few head dims, and a call takes the smallest that holds its own.
#pragma once

#include <algorithm>
#include <cstddef>

#include "core/problem.h"

namespace online_attention::cuda {

// Of a table in ascending order of `head_dim`. The registry sends no head dim above the last one's.
template <typename Bucket, std::size_t kCount>
const Bucket& bucket_for(const Bucket (&buckets)[kCount], const Shape& shape) {
  const int64_t head_dim = std::max(shape.D, shape.D_v);
  return *std::find_if(buckets, buckets + kCount - 1,
                       [&](const Bucket& b) { return head_dim <= b.head_dim; });
}

}  // namespace online_attention::cuda
