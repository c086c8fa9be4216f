// SPDX-License-Identifier: BSD-3-Clause
// The backward passes of the portable CUDA runners.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::portable {

// fp16 (sm_75) and bf16 (sm_80) on tensor cores through mma.sync; D and D_v up to 256.
int64_t tensor_core_backward_workspace_bytes(const BackwardArgs& args, const Device& device);
Status tensor_core_backward(const BackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::portable
