// SPDX-License-Identifier: BSD-3-Clause
// The body of launch_simt_backward_queries, for the .cu files that instantiate it.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/portable/simt_backward_queries.cuh"

namespace online_attention::cuda::portable {

template <typename Element, int kColumns, bool kAligned, bool kModified>
Status launch_simt_backward_queries(const BackwardArgs& args, const BackwardPlan& plan,
                                    const Launch& on) {
  using Real = typename SimtTraits<Element>::Real;
  using Config = SimtBackwardConfig<Real, kColumns>;
  const int64_t blocks = args.shape.B * args.shape.H * plan.q_tiles * plan.column_blocks;
  const Real* delta = BackwardBuffers<Real>::in(on.workspace, plan, args).delta;
  return launch(simt_backward_queries_kernel<Element, kColumns, kAligned, kModified>, blocks,
                Config::kThreads, Config::kSmemBytes, on.stream, args, plan, delta,
                gradient_factor<Real>(args), args.dropout.keep_scale<Real>());
}

}  // namespace online_attention::cuda::portable
