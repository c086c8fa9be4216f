// SPDX-License-Identifier: BSD-3-Clause
// The body of launch_tensor_core_backward, for the .cu files that instantiate it.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/portable/tensor_core_backward.cuh"
#include "cuda/portable/tensor_core_backward.h"

namespace online_attention::cuda::portable {

template <typename Element, int kHeadDim, SmemClass kSize>
Status launch_backward_class(const BackwardCall& call, const Launch& on) {
  constexpr BackwardConfig kConfig = kBackward<kHeadDim, kSize>;
  const Status status =
      launch(tensor_core_backward_kernel<Element, kHeadDim, kSize>, call.plan.blocks(),
             kConfig.threads(), kConfig.smem_bytes(), on.stream, call);
  if (status != kOk || call.dq_sums == nullptr) return status;
  return launch(store_dq_kernel<Element, kHeadDim, kSize>, call.plan.dq_tiles(), kConfig.threads(),
                kConfig.q_tile_bytes(), on.stream, call);
}

template <typename Element, int kHeadDim>
Status launch_tensor_core_backward(const BackwardArgs& args, const BackwardPlan& plan,
                                   const BackwardBuffers& buffers, SmemClass size,
                                   const Launch& on) {
  bool aligned = args.shape.D % kChunkElements == 0 && args.shape.D_v % kChunkElements == 0;
  for (const View* view : {&args.q, &args.k, &args.v, &args.dout, &args.dq, &args.dk, &args.dv}) {
    aligned = aligned && is_aligned_16(*view, sizeof(Element));
  }
  const BackwardCall call{args,
                          plan,
                          buffers.delta,
                          buffers.lse2,
                          buffers.dq_sums,
                          buffers.turns,
                          static_cast<float>(args.scale.sign * args.scale.log2),
                          aligned};
  if (size == SmemClass::large) {
    return launch_backward_class<Element, kHeadDim, SmemClass::large>(call, on);
  }
  if constexpr (std::is_same_v<Element, __half> && kHeadDim <= 192) {
    if (size == SmemClass::turing) {
      return launch_backward_class<Element, kHeadDim, SmemClass::turing>(call, on);
    }
  }
  return launch_backward_class<Element, kHeadDim, SmemClass::medium>(call, on);
}

}  // namespace online_attention::cuda::portable
