// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/launch.h"
#include "core/problem.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda {

// Merges the splits of a plan, in order, into out and lse (E11, E12).
Status combine(const ForwardArgs& args, const TilePlan& plan, const SplitBuffers<float>& partial,
               void* stream);
Status combine(const ForwardArgs& args, const TilePlan& plan, const SplitBuffers<double>& partial,
               void* stream);

}  // namespace online_attention::cuda
