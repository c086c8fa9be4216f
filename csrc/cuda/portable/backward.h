// SPDX-License-Identifier: BSD-3-Clause
// The backward passes of the portable CUDA runners.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::portable {

// fp16 (sm_75) and bf16 (sm_80) on tensor cores through mma.sync; D and D_v up to 256. What does
// not fit Turing's shared memory, head dims above 192, goes to simt_backward.
int64_t tensor_core_backward_workspace_bytes(const BackwardArgs& args, const Device& device);
Status tensor_core_backward(const BackwardArgs& args, const Launch& launch);

// Every dtype and head dim, in fp32 (fp64 for fp64) multiply-adds.
int64_t simt_backward_workspace_bytes(const BackwardArgs& args, const Device& device);
Status simt_backward(const BackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::portable
