// SPDX-License-Identifier: BSD-3-Clause
// What comes before and after the Hopper backward kernel for wide heads, row by row.
#pragma once

#include "core/launch.h"
#include "cuda/hopper/wide_backward_buffers.h"

namespace online_attention::cuda::hopper {

// lse2 and delta of every query row, zeros in the sums of dQ.
Status prepare_wide_rows(const BackwardArgs& args, const BackwardPlan& plan,
                         const WideBackwardConfig& config, const WideBackwardBuffers& buffers,
                         void* stream);
// dQ from its sums.
Status finish_wide_dq(const BackwardArgs& args, const BackwardPlan& plan,
                      const WideBackwardConfig& config, const WideBackwardBuffers& buffers,
                      void* stream);

}  // namespace online_attention::cuda::hopper
