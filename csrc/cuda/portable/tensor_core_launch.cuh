// SPDX-License-Identifier: BSD-3-Clause
// The body of launch_tensor_core, for the .cu files that instantiate it.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/portable/tensor_core_forward.cuh"
#include "cuda/portable/tensor_core_forward.h"

namespace online_attention::cuda::portable {

template <typename Element, int kHeadDim, bool kForTuring, bool kModified>
Status launch_config(const ForwardArgs& args, const TilePlan& plan, const Launch& on) {
  constexpr ForwardConfig kConfig = config_of<kHeadDim, kForTuring, kModified>();
  const bool aligned =
      args.shape.D % kChunkElements == 0 && args.shape.D_v % kChunkElements == 0 &&
      is_aligned_16(args.q, sizeof(Element)) && is_aligned_16(args.k, sizeof(Element)) &&
      is_aligned_16(args.v, sizeof(Element)) && is_aligned_16(args.out, sizeof(Element));
  const TensorCoreCall call{args,
                            plan,
                            SplitBuffers<float>::in(on.workspace, plan, args.shape),
                            static_cast<float>(args.scale.sign),
                            static_cast<float>(args.scale.log2),
                            aligned,
                            is_readable_in_pairs(args.bias, args.shape.S_kv, sizeof(Element))};
  return launch(tensor_core_forward_kernel<Element, kHeadDim, kForTuring, kModified>, plan.tiles(),
                kConfig.threads(), kConfig.smem_bytes(), on.stream, call);
}

template <typename Element, int kHeadDim, bool kModified>
Status launch_tensor_core(const ForwardArgs& args, const TilePlan& plan, const Launch& on) {
  if constexpr (std::is_same_v<Element, __half>) {
    if (on.device.arch < 80) {
      return launch_config<Element, kHeadDim, true, kModified>(args, plan, on);
    }
  }
  return launch_config<Element, kHeadDim, false, kModified>(args, plan, on);
}

}  // namespace online_attention::cuda::portable
