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
  // Merging is a launch and a workspace more: 5 us on the device and as much on the host, where a
  // key tile takes 0.7 to 1.6 us.
  const TileShape tile = {.m = config.tile_m(),
                          .n = config.tile_n,
                          .column_blocks = 1,
                          .blocks_per_sm = 1,
                          .packs = is_packable(args),
                          .merge_tiles = 6};
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
  // The keys and values of a section's heads are read from memory in its first wave of blocks,
  // which waits for them. So of short sequences, where that counts, all sections but the last have
  // the heads of one wave; the last one has short tiles for the gaps at the end.
  constexpr uint32_t kShort = 8;
  const bool is_short = 0 < tiles.q_tiles && tiles.q_tiles <= kShort;
  if (args.mask.is_banded() && tiles.splits == 1 && is_short) {
    const auto wave = static_cast<uint32_t>(
        ceil_div<int64_t>(multiprocessors, static_cast<int64_t>(tiles.q_tiles)));
    if (wave < tiles.section_heads) {
      tiles.lead_heads = tiles.heads - std::min(tiles.heads, tiles.section_heads);
      tiles.lead_section_heads = wave;
    }
  }
  plan.counts = args.mask.is_banded() && tiles.tiles() > multiprocessors;
  return plan;
}

}  // namespace online_attention::cuda::hopper
