// SPDX-License-Identifier: BSD-3-Clause
// The bodies of simt_tile and launch_simt, for the .cu files that instantiate them.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/portable/simt_forward.cuh"
#include "cuda/portable/simt_forward.h"

namespace online_attention::cuda::portable {

template <typename Element, int kOutColumns, int kKeys>
TileShape simt_tile(int64_t D_v) {
  using Config = SimtConfig<typename SimtTraits<Element>::Real, kOutColumns, kKeys>;
  const int64_t column_blocks = ceil_div<int64_t>(D_v, Config::kColumns);
  return {Config::kTileM, Config::kTileN, static_cast<int32_t>(column_blocks), 2};
}

template <typename Element, int kOutColumns, int kKeys>
Status launch_simt(const ForwardArgs& args, const TilePlan& plan, const Launch& on) {
  using Real = typename SimtTraits<Element>::Real;
  using Config = SimtConfig<Real, kOutColumns, kKeys>;
  constexpr int64_t kBytes = sizeof(Element);
  const bool aligned = args.shape.D * kBytes % 16 == 0 && args.shape.D_v * kBytes % 16 == 0 &&
                       is_aligned_16(args.q, kBytes) && is_aligned_16(args.k, kBytes) &&
                       is_aligned_16(args.v, kBytes);
  const auto partial = SplitBuffers<Real>::in(on.workspace, plan, args.shape);
  auto* kernel = simt_forward_kernel<Element, kOutColumns, kKeys, true>;
  // It takes all calls; fp32 ones without a bias or dropout have a faster kernel. (Others are rare,
  // and the library is to be small.)
  if constexpr (std::is_same_v<Element, float>) {
    if (!args.is_modified()) {
      kernel = simt_forward_kernel<Element, kOutColumns, kKeys, false>;
    }
  }
  return launch(kernel, plan.tiles(), Config::kThreads, Config::kSmemBytes, on.stream, args, plan,
                partial, aligned);
}

}  // namespace online_attention::cuda::portable
