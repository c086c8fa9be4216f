// SPDX-License-Identifier: BSD-3-Clause
// Which calls the Hopper runner takes, and the kernel compiled for their head dims.
#include "cuda/head_dim_bucket.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/forward.h"
#include "cuda/hopper/forward_launch.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::hopper {
namespace {

using LaunchKernel = Status (*)(const ForwardArgs&, const Launch&);

struct Bucket {
  int64_t head_dim;
  const ForwardConfig& config;
  LaunchKernel f16, bf16;
};

template <int kHeadDim>
constexpr Bucket bucket() {
  return {kHeadDim, kForward<kHeadDim>, launch_forward<__half, kHeadDim>,
          launch_forward<__nv_bfloat16, kHeadDim>};
}

constexpr Bucket kBuckets[] = {bucket<64>(), bucket<96>(), bucket<128>()};

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

// A grid that leaves most of the device idle, while there are keys to split: not here.
bool wants_splits(const ForwardArgs& args, const Device& device) {
  constexpr int64_t kLongKeys = 4096;
  const Shape& s = args.shape;
  if (args.batch_invariant || s.S_kv < kLongKeys) return false;
  const int64_t q_tiles = ceil_div<int64_t>(s.S_q, bucket_for(kBuckets, s).config.tile_m());
  return s.B * s.H * q_tiles * 4 < device.multiprocessors;
}

}  // namespace

bool runs_forward(const ForwardArgs& args, const Device& device) {
  constexpr int64_t kRowsMin = 64;  // fewer, and packing heads or splitting keys is worth more
  const Shape& s = args.shape;
  if (args.is_modified()) return false;
  if (s.S_q < kRowsMin || s.S_kv == 0 || wants_splits(args, device)) return false;
  const Addressing tma{args.batch_invariant};
  return tma.takes(args.q, s.B, s.H, s.S_q, s.D) && tma.takes(args.k, s.B, s.H_kv, s.S_kv, s.D) &&
         tma.takes(args.v, s.B, s.H_kv, s.S_kv, s.D_v) &&
         tma.takes(args.out, s.B, s.H, s.S_q, s.D_v);
}

// The counter of tiles taken; see ForwardCall.
int64_t forward_workspace_bytes(const ForwardArgs& args, const Device&) {
  return args.mask.is_banded() ? sizeof(uint32_t) : 0;
}

Status forward(const ForwardArgs& args, const Launch& launch) {
  const Bucket& bucket = bucket_for(kBuckets, args.shape);
  return (args.dtype == DType::f16 ? bucket.f16 : bucket.bf16)(args, launch);
}

}  // namespace online_attention::cuda::hopper
