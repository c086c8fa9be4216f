// SPDX-License-Identifier: BSD-3-Clause
// How a call is cut into tiles, and what it needs in the workspace.
#pragma once

#include "cuda/hopper/call.h"
#include "cuda/hopper/config.h"

namespace online_attention::cuda::hopper {

// Fills in plan, first_query and last_query.
void plan_call(const ForwardArgs& args, const ForwardConfig& config, int multiprocessors,
               ForwardCall& call);

int64_t workspace_bytes(const ForwardArgs& args, const ForwardCall& call);

// Fills in `taken` and `partial` of a call that has all the rest.
void place_workspace(void* workspace, ForwardCall& call);

}  // namespace online_attention::cuda::hopper
