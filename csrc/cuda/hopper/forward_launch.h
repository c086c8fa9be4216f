// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel: an element type and a head-dim bucket. Each is instantiated in a .cu of its
// own.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::hopper {

template <typename Element, int kHeadDim>
Status launch_forward(const ForwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::hopper
