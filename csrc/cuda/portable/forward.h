// SPDX-License-Identifier: BSD-3-Clause
// The portable CUDA runners: any NVIDIA GPU from Turing (sm_75) on.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::portable {

// fp16 (sm_75) and bf16 (sm_80) on tensor cores through mma.sync; D and D_v up to 256.
int64_t tensor_core_workspace_bytes(const ForwardArgs& args, const Device& device);
Status tensor_core_forward(const ForwardArgs& args, const Launch& launch);

// Every dtype and head dim, in fp32 (fp64 for fp64) multiply-adds.
int64_t simt_workspace_bytes(const ForwardArgs& args, const Device& device);
Status simt_forward(const ForwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::portable
