// SPDX-License-Identifier: BSD-3-Clause
// One compiled kernel of the SIMT runner: an element type, the output columns of a block and the
// keys of a tile. Tiles of 64 keys round less and take more instructions than those of 128.
#pragma once

#include "core/launch.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::portable {

// Tile shape, for the plan.
template <typename Element, int kOutColumns, int kKeys>
TileShape simt_tile(int64_t D_v);

template <typename Element, int kOutColumns, int kKeys>
Status launch_simt(const ForwardArgs& args, const TilePlan& plan, const Launch& launch);

}  // namespace online_attention::cuda::portable
