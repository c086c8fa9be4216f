// SPDX-License-Identifier: BSD-3-Clause
// The backward passes of the portable CUDA runners.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::portable {

// Every dtype and head dim, in fp32 (fp64 for fp64) multiply-adds.
int64_t simt_backward_workspace_bytes(const BackwardArgs& args, const Device& device);
Status simt_backward(const BackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::portable
