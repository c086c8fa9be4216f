// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/combine.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/softmax_row.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda {
namespace {

constexpr int kWarps = 4;

// One warp merges one row. Every lane holds the state of the whole row and every 32nd output
// column. Splits are taken in order, so the result is the same in every run.
template <typename Element, typename Real>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ ForwardArgs args, uint32_t splits,
                   const __grid_constant__ SplitBuffers<Real> partial) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= partial.rows) return;
  const Shape& shape = args.shape;

  SoftmaxRow<Real> whole;
  for (uint32_t split = 0; split < splits; ++split) {
    whole = SoftmaxRow<Real>::merge(whole, partial.states[split * partial.rows + row]);  // (E11)
  }
  const int64_t head = row / shape.S_q;
  Element* out = args.out.template row<Element>(head / shape.H, head % shape.H, row % shape.S_q);
  const Real inverse_sum = whole.inverse_sum();
  for (int64_t column = threadIdx.x % 32; column < shape.D_v; column += 32) {
    Real sum = 0;
    for (uint32_t split = 0; split < splits; ++split) {
      const int64_t slot = split * partial.rows + row;
      const Real factor = partial.states[slot].rescale_to(whole);  // (E12)
      sum += factor * partial.out[slot * partial.padded_columns(shape) + column];
    }
    out[column] = static_cast<Element>(sum * inverse_sum);
  }
  if (threadIdx.x % 32 == 0) static_cast<Real*>(args.lse)[row] = whole.lse();
}

template <typename Element, typename Real>
Status combine_as(const ForwardArgs& args, const TilePlan& plan, const SplitBuffers<Real>& partial,
                  void* stream) {
  return launch(combine_kernel<Element, Real>, ceil_div<int64_t>(partial.rows, kWarps), 32 * kWarps,
                0, stream, args, plan.splits, partial);
}

}  // namespace

Status combine(const ForwardArgs& args, const TilePlan& plan, const SplitBuffers<float>& partial,
               void* stream) {
  switch (args.dtype) {
    case DType::f16:
      return combine_as<__half>(args, plan, partial, stream);
    case DType::bf16:
      return combine_as<__nv_bfloat16>(args, plan, partial, stream);
    default:
      return combine_as<float>(args, plan, partial, stream);
  }
}

Status combine(const ForwardArgs& args, const TilePlan& plan, const SplitBuffers<double>& partial,
               void* stream) {
  return combine_as<double>(args, plan, partial, stream);
}

}  // namespace online_attention::cuda
