// SPDX-License-Identifier: BSD-3-Clause
// Which calls the Hopper runner takes, and the kernel compiled for their head dims.
#include <algorithm>
#include <iterator>
#include <limits>

#include "cuda/hopper/addressing.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/forward.h"
#include "cuda/hopper/forward_launch.h"
#include "cuda/hopper/forward_plan.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::hopper {
namespace {

using LaunchKernel = Status (*)(const ForwardArgs&, const Launch&);

struct Bucket {
  const ForwardConfig& config;
  LaunchKernel f16, bf16;
};

template <int kHeadDim, int kValueDim, int kRows>
constexpr Bucket bucket() {
  return {kForward<kHeadDim, kValueDim, kRows>, launch_forward<__half, kHeadDim, kValueDim, kRows>,
          launch_forward<__nv_bfloat16, kHeadDim, kValueDim, kRows>};
}

// From small to large; the last one holds all that the registry sends. `tall` has more rows in a
// query tile, for calls long enough to fill them.
struct Buckets {
  Bucket wide;
  Bucket tall;
  int64_t tall_from, tall_from_masked;  // S_kv
};
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
template <int kHeadDim, int kValueDim>
constexpr Buckets one_bucket() {
  constexpr Bucket only = bucket<kHeadDim, kValueDim, 128>();
  return {only, only, kNever, kNever};
}
constexpr Buckets kBuckets[] = {
    {bucket<64, 64, 128>(), bucket<64, 64, 192>(), 2048, 2048},
    {bucket<96, 96, 128>(), bucket<96, 96, 192>(), 2048, 2048},
    {bucket<128, 128, 128>(), bucket<128, 128, 192>(), 2048, 8192},
    one_bucket<192, 128>(),
    one_bucket<192, 192>(),
    one_bucket<256, 256>(),
};

// Rows that a multiprocessor computes, one query tile after the other, with tiles of `m` rows.
int64_t rows_in_turn(const Shape& s, int64_t m, int multiprocessors) {
  return ceil_div<int64_t>(s.B * s.H * ceil_div(s.S_q, m), multiprocessors) * m;
}

// Depends on lengths alone if args.batch_invariant.
const Bucket& bucket_for(const ForwardArgs& args, const Device& device) {
  const Shape& s = args.shape;
  const Buckets& buckets =
      *std::find_if(std::begin(kBuckets), std::end(kBuckets) - 1, [&](const Buckets& b) {
        return s.D <= b.wide.config.head_dim && s.D_v <= b.wide.config.value_dim;
      });
  const int64_t from = args.mask.is_banded() ? buckets.tall_from_masked : buckets.tall_from;
  const int wide = buckets.wide.config.tile_m(), tall = buckets.tall.config.tile_m();
  if (s.S_q <= wide || s.S_kv < from) return buckets.wide;
  // Few tiles: those of more rows may leave more of the device idle in the last turn.
  const bool idles = !args.batch_invariant && rows_in_turn(s, wide, device.multiprocessors) * 9 <
                                                  rows_in_turn(s, tall, device.multiprocessors) * 8;
  return idles ? buckets.wide : buckets.tall;
}

ForwardPlan plan_for(const ForwardArgs& args, const Device& device) {
  return plan_forward(args, bucket_for(args, device).config, device.multiprocessors);
}

}  // namespace

bool runs_forward(const ForwardArgs& args, const Device& device) {
  constexpr int32_t kRowsMin = 64;  // fewer do not fill a warpgroup
  const Shape& s = args.shape;
  if (args.is_modified() || s.S_kv == 0) return false;
  if (plan_for(args, device).tiles.rows < kRowsMin) return false;
  const auto takes = [&](const View& view, int64_t H, int64_t S, int64_t D) {
    return is_addressable(view, s.B, H, S, D, args.batch_invariant);
  };
  return takes(args.q, s.H, s.S_q, s.D) && takes(args.k, s.H_kv, s.S_kv, s.D) &&
         takes(args.v, s.H_kv, s.S_kv, s.D_v) && takes(args.out, s.H, s.S_q, s.D_v);
}

int64_t forward_workspace_bytes(const ForwardArgs& args, const Device& device) {
  return plan_for(args, device).workspace_bytes(args);
}

Status forward(const ForwardArgs& args, const Launch& launch) {
  const Bucket& bucket = bucket_for(args, launch.device);
  return (args.dtype == DType::f16 ? bucket.f16 : bucket.bf16)(args, launch);
}

}  // namespace online_attention::cuda::hopper
