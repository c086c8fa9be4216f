// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of the Hopper runner.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::hopper {

// Whether this runner takes the call: D and D_v up to 256, addressable by the copy engine, and
// nothing but its mask decides on a pair. Sums of dQ come in any order, so not if the call is to be
// deterministic.
bool runs_backward(const BackwardArgs& args, const Device& device);
int64_t backward_workspace_bytes(const BackwardArgs& args, const Device& device);
Status backward(const BackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::hopper
