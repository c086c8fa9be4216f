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

template <int kHeadDim, int kValueDim, Calls kCalls>
constexpr Bucket bucket() {
  return {kForward<kHeadDim, kValueDim, kCalls>,
          launch_forward<__half, kHeadDim, kValueDim, kCalls>,
          launch_forward<__nv_bfloat16, kHeadDim, kValueDim, kCalls>};
}

// For calls of head dims up to these.
struct Buckets {
  Bucket any;
  Bucket masked;         // for calls with a mask and fewer keys than
  int64_t masked_below;  // this
  Bucket longer;         // for calls long enough to fill its query tiles: with so many keys or more
  int64_t longer_from, longer_from_masked;
};
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
template <int kHeadDim, int kValueDim>
constexpr Buckets one_bucket() {
  constexpr Bucket only = bucket<kHeadDim, kValueDim, Calls::any>();
  return {only, only, 0, only, kNever, kNever};
}
template <int kHeadDim>
constexpr Buckets two_buckets(int64_t longer_from) {
  constexpr Bucket any = bucket<kHeadDim, kHeadDim, Calls::any>();
  return {any, any, 0, bucket<kHeadDim, kHeadDim, Calls::longer>(), longer_from, longer_from};
}
// From small to large; the last one holds all that the registry sends.
constexpr Buckets kBuckets[] = {
    two_buckets<64>(2048),
    two_buckets<96>(2048),
    {bucket<128, 128, Calls::any>(), bucket<128, 128, Calls::masked>(), kNever,
     bucket<128, 128, Calls::longer>(), 2048, 8192},
    one_bucket<192, 128>(),
    one_bucket<192, 192>(),
    {bucket<256, 256, Calls::any>(), bucket<256, 256, Calls::masked>(), 1024,
     bucket<256, 256, Calls::any>(), kNever, kNever},
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
        return s.D <= b.any.config.head_dim && s.D_v <= b.any.config.value_dim;
      });
  const bool masked = args.mask.is_banded();
  const Bucket& usual = masked && s.S_kv < buckets.masked_below ? buckets.masked : buckets.any;
  const int64_t from = masked ? buckets.longer_from_masked : buckets.longer_from;
  const int rows = usual.config.tile_m(), more_rows = buckets.longer.config.tile_m();
  if (s.S_q <= rows || s.S_kv < from) return usual;
  // Few tiles: those of more rows may leave more of the device idle in the last turn.
  const bool idles =
      !args.batch_invariant && rows_in_turn(s, rows, device.multiprocessors) * 9 <
                                   rows_in_turn(s, more_rows, device.multiprocessors) * 8;
  return idles ? usual : buckets.longer;
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
