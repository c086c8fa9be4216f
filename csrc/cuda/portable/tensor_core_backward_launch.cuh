// SPDX-License-Identifier: BSD-3-Clause
// The bodies of launch_tensor_core_backward and launch_store_dq, for the .cu files that instantiate
// it.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/portable/tensor_core_backward.cuh"
#include "cuda/portable/tensor_core_backward.h"

namespace online_attention::cuda::portable {

template <typename Element>
BackwardCall backward_call(const BackwardArgs& args, const BackwardPlan& plan,
                           const BackwardBuffers& buffers) {
  bool aligned = args.shape.D % kChunkElements == 0 && args.shape.D_v % kChunkElements == 0;
  for (const View* view : {&args.q, &args.k, &args.v, &args.dout, &args.dq, &args.dk, &args.dv}) {
    aligned = aligned && is_aligned_16(*view, sizeof(Element));
  }
  return {args,
          plan,
          buffers.delta,
          buffers.lse2,
          buffers.dq_sums,
          buffers.turns,
          static_cast<float>(args.scale.sign * args.scale.log2),
          aligned,
          args.dropout.keep_scale()};
}

// Calls visit with the class of shared-memory sizes as a constant; those that a kernel is compiled
// for.
template <typename Element, int kHeadDim, typename Visit>
Status with_smem_class(SmemClass size, const Visit& visit) {
  if (size == SmemClass::large) return visit(std::integral_constant<SmemClass, SmemClass::large>());
  if constexpr (std::is_same_v<Element, __half> && kHeadDim <= 192) {
    if (size == SmemClass::turing)
      return visit(std::integral_constant<SmemClass, SmemClass::turing>());
  }
  return visit(std::integral_constant<SmemClass, SmemClass::medium>());
}

template <typename Element, int kHeadDim, bool kModified>
Status launch_tensor_core_backward(const BackwardArgs& args, const BackwardPlan& plan,
                                   const BackwardBuffers& buffers, SmemClass size,
                                   const Launch& on) {
  const BackwardCall call = backward_call<Element>(args, plan, buffers);
  return with_smem_class<Element, kHeadDim>(size, [&](auto constant) {
    constexpr SmemClass kSize = decltype(constant)::value;
    constexpr BackwardConfig kConfig = kBackward<kHeadDim, kSize>;
    return launch(tensor_core_backward_kernel<Element, kHeadDim, kSize, kModified>, plan.blocks(),
                  kConfig.threads(), kConfig.smem_bytes(), on.stream, call);
  });
}

template <typename Element, int kHeadDim>
Status launch_store_dq(const BackwardArgs& args, const BackwardPlan& plan,
                       const BackwardBuffers& buffers, SmemClass size, const Launch& on) {
  const BackwardCall call = backward_call<Element>(args, plan, buffers);
  return with_smem_class<Element, kHeadDim>(size, [&](auto constant) {
    constexpr SmemClass kSize = decltype(constant)::value;
    constexpr BackwardConfig kConfig = kBackward<kHeadDim, kSize>;
    return launch(store_dq_kernel<Element, kHeadDim, kSize>, plan.dq_tiles(), kConfig.threads(),
                  kConfig.q_tile_bytes(), on.stream, call);
  });
}

}  // namespace online_attention::cuda::portable
