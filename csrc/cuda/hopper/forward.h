// SPDX-License-Identifier: BSD-3-Clause
// The Hopper runner: fp16 and bf16 on wgmma, fed by the copy engine (TMA). sm_90a alone.
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::hopper {

// Whether it runs the call: the copy engine can address every tensor, nothing modifies the scores,
// and there are rows enough to fill tiles. By lengths alone if args.batch_invariant.
bool runs_forward(const ForwardArgs& args, const Device& device);

int64_t forward_workspace_bytes(const ForwardArgs& args, const Device& device);
Status forward(const ForwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::hopper
