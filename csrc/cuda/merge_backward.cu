// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/merge.cuh"
#include "cuda/merge.h"

namespace online_attention::cuda {
namespace {

// (E32), and <dout, out_r>, of which each lane returns its own columns' share.
template <typename Element, typename Real, int kVector>
__device__ __forceinline__ Real out_gradient(const MergeBackwardArgs& args, const RowLane& at,
                                             const MergePart& part, int r, bool visible, Real w) {
  const bool needs_dot = args.d_lses != nullptr && visible;
  const Element* dout = visible ? at.in<const Element>(args.dout) : nullptr;
  const Element* out = at.in<const Element>(part.out);
  Element* d_out =
      args.d_outs.data == nullptr ? nullptr : at.in<Element>(args.d_outs) + r * args.d_outs_stride;
  Real dot = 0;
  for (int64_t d = at.lane * kVector; d < args.shape.D_v; d += at.lanes * kVector) {
    Chunk<Element, kVector> gradient, value;
    for (int i = 0; i < kVector; ++i) gradient.values[i] = static_cast<Element>(Real(0));
    if (visible) gradient = Chunk<Element, kVector>::load(dout + d);
    if (needs_dot) {
      value = Chunk<Element, kVector>::load(out + d);
      for (int i = 0; i < kVector; ++i) {
        dot += static_cast<Real>(gradient.values[i]) * static_cast<Real>(value.values[i]);
      }
    }
    if (d_out == nullptr) continue;
    for (int i = 0; i < kVector; ++i) {
      gradient.values[i] = static_cast<Element>(w * static_cast<Real>(gradient.values[i]));
    }
    gradient.store(d_out + d);
  }
  return dot;
}

// (E32), (E33)
template <typename Element, typename Real, int kVector, typename Parts>
__global__ void __launch_bounds__(kMergeThreads)
    merge_backward_kernel(const __grid_constant__ MergeBackwardArgs args,
                          const __grid_constant__ Parts parts, int lanes_log2) {
  RowLane at(lanes_log2);
  const int64_t rows = args.shape.rows();
  if (at.row >= rows) return;
  at.locate(args.shape);
  const auto count = static_cast<int>(args.count);
  const MergedRow<Real> row = weigh<Real>(parts, count, at);
  Real* const d_lses = static_cast<Real*>(args.d_lses) + at.row;
  Real whole = 0;  // <dout, out>
  for (int r = 0; r < count; ++r) {
    const Real lse = *at.in<const Real>(parts[r].lse);
    const Real w = row.weight(lse);
    const bool empty = row.is_empty(lse);
    const bool visible = args.dout.data != nullptr && !empty;
    // Beside a NaN the weight of an empty part is NaN too; its gradient is 0 all the same.
    const Real dot =
        out_gradient<Element, Real, kVector>(args, at, parts[r], r, visible, visible ? w : Real(0));
    if (args.d_lses == nullptr) continue;
    const Real inner = at.sum(dot);  // <dout, out_r>
    if (!empty) whole += w * inner;
    if (at.lane == r % at.lanes) d_lses[r * rows] = inner;
  }
  if (args.d_lses == nullptr) return;
  const Real dlse = args.dlse.data == nullptr ? Real(0) : *at.in<const Real>(args.dlse);
  // Each lane finishes what it has written itself.
  for (int r = at.lane; r < count; r += at.lanes) {
    const Real lse = *at.in<const Real>(parts[r].lse);
    const Real inner = d_lses[r * rows];
    d_lses[r * rows] = row.is_empty(lse) ? Real(0) : row.weight(lse) * (dlse + (inner - whole));
  }
}

template <typename Element, typename Real, int kVector>
Status backward_as(const MergeBackwardArgs& args, const Launch& launch) {
  return launch_merge(merge_backward_kernel<Element, Real, kVector, PartsHere>,
                      merge_backward_kernel<Element, Real, kVector, PartsInMemory>, kVector, args,
                      launch);
}

template <typename Element, typename Real>
Status backward_of(const MergeBackwardArgs& args, const Launch& launch) {
  const bool chunks = takes_chunks(args, {&args.dout, &args.d_outs}) &&
                      args.d_outs_stride * static_cast<int64_t>(sizeof(Element)) % 16 == 0;
  return chunks ? backward_as<Element, Real, 16 / sizeof(Element)>(args, launch)
                : backward_as<Element, Real, 1>(args, launch);
}

}  // namespace

int64_t merge_workspace_bytes(const MergeBackwardArgs& args, const Device&) {
  return merge_workspace_bytes_of(args);
}

Status merge_backward(const MergeBackwardArgs& args, const Launch& launch) {
  switch (args.dtype) {
    case DType::f16:
      return backward_of<__half, float>(args, launch);
    case DType::bf16:
      return backward_of<__nv_bfloat16, float>(args, launch);
    case DType::f32:
      return backward_of<float, float>(args, launch);
    case DType::f64:
      break;
  }
  return backward_of<double, double>(args, launch);
}

}  // namespace online_attention::cuda
