// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel: an element type and a row of kForward. Each is instantiated in a .cu of its
// own.
#pragma once

#include "core/launch.h"
#include "core/problem.h"
#include "cuda/hopper/config.h"

namespace online_attention::cuda::hopper {

template <typename Element, int kHeadDim, int kValueDim, Calls kCalls>
Status launch_forward(const ForwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::hopper
