// SPDX-License-Identifier: BSD-3-Clause
// What comes before and after the Hopper backward kernel, row by row.
#pragma once

#include "core/launch.h"
#include "cuda/hopper/backward_buffers.h"

namespace online_attention::cuda::hopper {

// lse2 and delta of every query row, zeros in the counters and in sums that are not ordered, zeros
// in the dQ of query tiles that see no key.
Status prepare_rows(const BackwardArgs& args, const BackwardPlan& plan,
                    const BackwardConfig& config, const BackwardBuffers& buffers, void* stream);
// dQ from its sums.
Status finish_dq(const BackwardArgs& args, const BackwardPlan& plan, const BackwardConfig& config,
                 const BackwardBuffers& buffers, void* stream);

}  // namespace online_attention::cuda::hopper
