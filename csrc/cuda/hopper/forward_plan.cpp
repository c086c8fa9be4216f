// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/forward_plan.h"

#include <algorithm>

namespace online_attention::cuda::hopper {
namespace {

// A box of Q holds whole queries: all heads of a group.
bool is_packable(const ForwardArgs& args) {
  return kQBoxRows % args.shape.group() == 0 && args.q.stride_h != 0;
}

}  // namespace

ForwardPlan plan_forward(const ForwardArgs& args, const ForwardConfig& config,
                         int multiprocessors) {
  const TileShape tile = {.m = config.tile_m(),
                          .n = config.tile_n,
                          .column_blocks = 1,
                          .blocks_per_sm = 1,
                          .packs = is_packable(args)};
  ForwardPlan plan;
  TilePlan& tiles = plan.tiles;
  tiles = plan_tiles(args, tile, multiprocessors);
  const auto S_q = static_cast<int32_t>(args.shape.S_q);
  // The states of all rows are merged where the keys are split.
  const QRange seeing =
      tiles.splits > 1 ? QRange{0, S_q} : args.mask.q_range(0, args.mask.s_kv, S_q);
  plan.first_query = seeing.begin;
  plan.last_query = seeing.begin + seeing.size();
  tiles.q_tiles = ceil_div(seeing.size() * tiles.pack, config.tile_m());
  // Sections of short sequences are no larger than one wave of blocks: the keys and values of more
  // heads would all be read from memory in the first wave, which waits for them.
  constexpr uint32_t kShort = 4;
  if (tiles.q_tiles <= kShort) {
    const auto wave = static_cast<uint32_t>(ceil_div(multiprocessors, static_cast<int>(kShort)));
    tiles.section_heads = std::min(tiles.section_heads, wave);
  }
  return plan;
}

}  // namespace online_attention::cuda::hopper
