// SPDX-License-Identifier: BSD-3-Clause
// The bodies of simt_backward_tile and launch_simt_backward_keys, for the .cu files that
// instantiate them.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/portable/simt_backward_keys.cuh"

namespace online_attention::cuda::portable {

template <typename Element, int kColumns>
BackwardTile simt_backward_tile() {
  using Config = SimtBackwardConfig<typename SimtTraits<Element>::Real, kColumns>;
  return {Config::kTileM, Config::kTileN, Config::kColumns};
}

template <typename Element, int kColumns, bool kAligned, bool kModified>
Status launch_simt_backward_keys(const BackwardArgs& args, const BackwardPlan& plan,
                                 const Launch& on) {
  using Real = typename SimtTraits<Element>::Real;
  using Config = SimtBackwardConfig<Real, kColumns>;
  const Shape& s = args.shape;
  const int64_t blocks = s.B * s.H_kv * plan.key_tiles * plan.parts * plan.column_blocks;
  const bool dq_aligned =
      s.D * sizeof(Element) % 16 == 0 && is_aligned_16(args.dq, sizeof(Element));
  return launch(simt_backward_keys_kernel<Element, kColumns, kAligned, kModified>, blocks,
                Config::kThreads, Config::kSmemBytes, on.stream, args, plan,
                BackwardBuffers<Real>::in(on.workspace, plan, args), gradient_factor<Real>(args),
                dq_aligned, args.dropout.keep_scale<Real>());
}

}  // namespace online_attention::cuda::portable
