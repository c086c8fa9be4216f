// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of the Hopper runner for wide heads: calls that the kernels of backward.h are
// too narrow for.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::hopper {

// Whether D or D_v is beyond the other kernels' and both are within these'.
bool is_wide(const Shape& shape);
// Of calls that runs_backward takes.
int64_t wide_backward_workspace_bytes(const BackwardArgs& args, const Device& device);
Status wide_backward(const BackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::hopper
