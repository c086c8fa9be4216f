// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel of the SIMT runner: an element type and the number of output columns of a
// block.
#pragma once

#include "core/launch.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::portable {

// Tile shape, for the plan; `columns` and `blocks_per_sm` are left to the caller.
template <typename Element, int kOutColumns>
TileShape simt_tile();

template <typename Element, int kOutColumns>
Status launch_simt(const ForwardArgs& args, const TilePlan& plan, const Launch& launch);

}  // namespace online_attention::cuda::portable
