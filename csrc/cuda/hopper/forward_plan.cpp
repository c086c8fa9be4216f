// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/forward_plan.h"

#include <algorithm>

namespace online_attention::cuda::hopper {
namespace {

constexpr int64_t kCounterBytes = 256;  // of `taken`, so that what follows is aligned

// A box of Q holds whole queries: all heads of a group.
bool is_packable(const ForwardArgs& args) {
  return kQBoxRows % args.shape.group() == 0 && args.q.stride_h != 0;
}

}  // namespace

void plan_call(const ForwardArgs& args, const ForwardConfig& config, int multiprocessors,
               ForwardCall& call) {
  const TileShape tile = {.m = config.tile_m(),
                          .n = config.tile_n,
                          .column_blocks = 1,
                          .blocks_per_sm = 1,
                          .packs = is_packable(args)};
  TilePlan& plan = call.plan;
  plan = plan_tiles(args, tile, multiprocessors);
  const auto S_q = static_cast<int32_t>(args.shape.S_q);
  // The states of all rows are merged where the keys are split.
  const QRange seeing =
      plan.splits > 1 ? QRange{0, S_q} : args.mask.q_range(0, args.mask.s_kv, S_q);
  call.first_query = seeing.begin;
  call.last_query = seeing.begin + seeing.size();
  plan.q_tiles = ceil_div(seeing.size() * plan.pack, config.tile_m());
  // Sections of short sequences are no larger than one wave of blocks: the keys and values of more
  // heads would all be read from memory in the first wave, which waits for them.
  constexpr uint32_t kShort = 4;
  if (plan.q_tiles <= kShort) {
    const auto wave = static_cast<uint32_t>(ceil_div(multiprocessors, static_cast<int>(kShort)));
    plan.section_heads = std::min(plan.section_heads, wave);
  }
}

int64_t workspace_bytes(const ForwardArgs& args, const ForwardCall& call) {
  return kCounterBytes + SplitBuffers<float>::bytes(call.plan, args.shape);
}

void place_workspace(void* workspace, ForwardCall& call) {
  // Full calls have tiles of one length.
  const bool counts = call.args.mask.is_banded();
  call.taken = counts ? static_cast<uint32_t*>(workspace) : nullptr;
  call.partial = SplitBuffers<float>::in(static_cast<char*>(workspace) + kCounterBytes, call.plan,
                                         call.args.shape);
}

}  // namespace online_attention::cuda::hopper
