// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/merge.h"

#include "cuda/merge.cuh"

namespace online_attention::cuda {
namespace {

// (E13)
template <typename Element, typename Real, int kVector, typename Parts>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ MergeArgs args, const __grid_constant__ Parts parts,
                 int lanes_log2) {
  RowLane at(lanes_log2);
  if (at.row >= args.shape.rows()) return;
  at.locate(args.shape);
  const auto count = static_cast<int>(args.count);
  const MergedRow<Real> row = weigh<Real>(parts, count, at);
  Element* out = at.in<Element>(args.out);
  for (int64_t d = at.lane * kVector; d < args.shape.D_v; d += at.lanes * kVector) {
    Real sums[kVector] = {};
#pragma unroll 4
    for (int r = 0; r < count; ++r) {
      const auto part = Chunk<Element, kVector>::load(at.in<const Element>(parts[r].out) + d);
      const Real lse = *at.in<const Real>(parts[r].lse);
      const Real w = row.weight(lse);
      if (row.is_empty(lse)) continue;
      for (int i = 0; i < kVector; ++i) sums[i] += w * static_cast<Real>(part.values[i]);
    }
    Chunk<Element, kVector> whole;
    for (int i = 0; i < kVector; ++i) whole.values[i] = static_cast<Element>(sums[i]);
    whole.store(out + d);
  }
  if (at.lane == 0) static_cast<Real*>(args.lse)[at.row] = row.lse();
}

template <typename Element, typename Real, int kVector>
Status merge_as(const MergeArgs& args, const Launch& launch) {
  return launch_merge(merge_kernel<Element, Real, kVector, PartsHere>,
                      merge_kernel<Element, Real, kVector, PartsInMemory>, kVector, args, launch);
}

template <typename Element, typename Real>
Status merge_of(const MergeArgs& args, const Launch& launch) {
  return takes_chunks(args, {&args.out})
             ? merge_as<Element, Real, 16 / sizeof(Element)>(args, launch)
             : merge_as<Element, Real, 1>(args, launch);
}

}  // namespace

int64_t merge_workspace_bytes(const MergeArgs& args, const Device&) {
  return merge_workspace_bytes_of(args);
}

Status merge(const MergeArgs& args, const Launch& launch) {
  switch (args.dtype) {
    case DType::f16:
      return merge_of<__half, float>(args, launch);
    case DType::bf16:
      return merge_of<__nv_bfloat16, float>(args, launch);
    case DType::f32:
      return merge_of<float, float>(args, launch);
    case DType::f64:
      break;
  }
  return merge_of<double, double>(args, launch);
}

}  // namespace online_attention::cuda
