// SPDX-License-Identifier: BSD-3-Clause
// Which calls the Hopper runner takes, and the kernel compiled for their head dims.
#include <algorithm>
#include <iterator>
#include <limits>

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
    {bucket<64, 64, 128>(), bucket<64, 64, 192>(), 0, 2048},
    one_bucket<96, 96>(),
    {bucket<128, 128, 128>(), bucket<128, 128, 192>(), 2048, 8192},
    one_bucket<192, 128>(),
    one_bucket<192, 192>(),
    one_bucket<256, 256>(),
};

// Depends on lengths alone, as args.batch_invariant asks.
const Bucket& bucket_for(const ForwardArgs& args) {
  const Shape& s = args.shape;
  const Buckets& buckets =
      *std::find_if(std::begin(kBuckets), std::end(kBuckets) - 1, [&](const Buckets& b) {
        return s.D <= b.wide.config.head_dim && s.D_v <= b.wide.config.value_dim;
      });
  const int64_t from = args.mask.is_banded() ? buckets.tall_from_masked : buckets.tall_from;
  const bool fills = s.S_q > buckets.wide.config.tile_m();
  return fills && s.S_kv >= from ? buckets.tall : buckets.wide;
}

constexpr int64_t kUnit = 16;                     // bytes: what TMA addresses are multiples of
constexpr int64_t kStrideEnd = int64_t{1} << 40;  // bytes

// What the strides of one tensor have to be. A dimension of size 1 has none that matters, but a
// batch of one must be judged as the batch it may have been cut from, if that is to change nothing.
struct Addressing {
  bool strides_of_one_matter;

  bool takes(int64_t size, int64_t stride, bool may_be_zero) const {
    constexpr int64_t kBytes = 2;  // of an element
    if (size <= 1 && !strides_of_one_matter) return true;
    if (stride == 0) return may_be_zero;
    return stride > 0 && stride < kStrideEnd / kBytes && stride * kBytes % kUnit == 0;
  }
  // [B, H, S, D]. Heads and batches may be broadcast.
  bool takes(const View& view, int64_t B, int64_t H, int64_t S, int64_t D) const {
    return reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 && D % 8 == 0 &&
           takes(B, view.stride_b, true) && takes(H, view.stride_h, true) &&
           takes(S, view.stride_s, false);
  }
};

}  // namespace

bool runs_forward(const ForwardArgs& args, const Device& device) {
  constexpr int32_t kRowsMin = 64;  // fewer do not fill a warpgroup
  const Shape& s = args.shape;
  if (args.is_modified() || s.S_kv == 0) return false;
  ForwardCall call;
  plan_call(args, bucket_for(args).config, device.multiprocessors, call);
  if (call.plan.rows < kRowsMin) return false;
  const Addressing tma{args.batch_invariant};
  return tma.takes(args.q, s.B, s.H, s.S_q, s.D) && tma.takes(args.k, s.B, s.H_kv, s.S_kv, s.D) &&
         tma.takes(args.v, s.B, s.H_kv, s.S_kv, s.D_v) &&
         tma.takes(args.out, s.B, s.H, s.S_q, s.D_v);
}

int64_t forward_workspace_bytes(const ForwardArgs& args, const Device& device) {
  ForwardCall call;
  plan_call(args, bucket_for(args).config, device.multiprocessors, call);
  return workspace_bytes(args, call);
}

Status forward(const ForwardArgs& args, const Launch& launch) {
  const Bucket& bucket = bucket_for(args);
  return (args.dtype == DType::f16 ? bucket.f16 : bucket.bf16)(args, launch);
}

}  // namespace online_attention::cuda::hopper
