// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/backward_plan.h"

#include <algorithm>

namespace online_attention::cuda {
namespace {

// What the blocks of a section read and add to is about this much: a share of the L2 cache of an
// A100 (40 MB) or H100 (50 MB).
constexpr double kSectionBytes = double{32 << 20};
// Yet a section has at least this many blocks for each multiprocessor, or the long blocks of the
// last section would run on while the rest of the device is idle.
constexpr int64_t kSectionRounds = 4;
constexpr int64_t kMaxSectionBlocks = int64_t{1} << 30;

}  // namespace

BackwardPlan plan_backward(const BackwardArgs& args, int32_t tile_m, int32_t tile_n,
                           int multiprocessors) {
  const Shape& s = args.shape;
  BackwardPlan plan;
  plan.tile_m = tile_m;
  plan.tile_n = tile_n;
  plan.group = static_cast<int32_t>(s.group());
  plan.q_tiles = static_cast<uint32_t>(ceil_div<int64_t>(s.S_q, tile_m));
  plan.kv_tiles = static_cast<uint32_t>(ceil_div<int64_t>(s.S_kv, tile_n));
  plan.heads = static_cast<uint32_t>(s.B * s.H_kv);
  plan.heads_per_batch = static_cast<uint32_t>(s.H_kv);
  if (args.mask.is_banded()) {
    // Blocks that run side by side are at about the same query head of their group.
    const double head_bytes =
        static_cast<double>(s.S_q) *
        (static_cast<double>(s.D + s.D_v) * static_cast<double>(element_bytes(args.dtype)) +
         static_cast<double>(s.D) * sizeof(float));
    const auto fitting =
        static_cast<int64_t>(std::min(kSectionBytes / std::max(head_bytes, 1.0), 1e9));
    const int64_t filling = ceil_div<int64_t>(kSectionRounds * multiprocessors, plan.kv_tiles);
    const int64_t wanted = std::max<int64_t>({fitting, filling, 1});
    // Of about equal length: a short last section would be one of few, long blocks.
    const int64_t sections = std::max<int64_t>(plan.heads / wanted, 1);
    plan.section_heads = static_cast<uint32_t>(std::min<int64_t>(
        ceil_div<int64_t>(plan.heads, sections), kMaxSectionBlocks / plan.kv_tiles + 1));
  }
  return plan;
}

}  // namespace online_attention::cuda
