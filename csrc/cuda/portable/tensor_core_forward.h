// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel of the tensor-core runner: an element type and a head-dim bucket. Each is
// instantiated in a .cu of its own.
#pragma once

#include "core/launch.h"
#include "cuda/portable/config.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::portable {

// kModified: of calls with a bias or dropout.
template <typename Element, int kHeadDim, bool kModified>
Status launch_tensor_core(const ForwardArgs& args, const TilePlan& plan, const Launch& launch);

}  // namespace online_attention::cuda::portable
