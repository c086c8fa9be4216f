// SPDX-License-Identifier: BSD-3-Clause
// Plans a call of the tensor-core runner and sends it to the kernel compiled for its head dims.
#include "cuda/combine.h"
#include "cuda/head_dim_bucket.h"
#include "cuda/portable/forward.h"
#include "cuda/portable/tensor_core_forward.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::portable {
namespace {

using LaunchKernel = Status (*)(const ForwardArgs&, const TilePlan&, const Launch&);

struct Bucket {
  int64_t head_dim;
  ForwardConfig ampere, turing;
  LaunchKernel f16, bf16;
};

template <int kHeadDim, bool kModified>
constexpr Bucket bucket() {
  return {kHeadDim, config_of<kHeadDim, false, kModified>(), config_of<kHeadDim, true, kModified>(),
          launch_tensor_core<__half, kHeadDim, kModified>,
          launch_tensor_core<__nv_bfloat16, kHeadDim, kModified>};
}

constexpr Bucket kBuckets[] = {bucket<64, false>(), bucket<96, false>(), bucket<128, false>(),
                               bucket<192, false>(), bucket<256, false>()};
// Of calls with a bias or dropout. Fewer, for a small library: 96 and 192 are rare.
constexpr Bucket kModifiedBuckets[] = {bucket<64, true>(), bucket<128, true>(),
                                       bucket<256, true>()};

const Bucket& bucket_of(const ForwardArgs& args) {
  return args.is_modified() ? bucket_for(kModifiedBuckets, args.shape)
                            : bucket_for(kBuckets, args.shape);
}

TilePlan plan_for(const ForwardArgs& args, const Device& device) {
  const Bucket& bucket = bucket_of(args);
  const ForwardConfig& config = device.arch < 80 ? bucket.turing : bucket.ampere;
  return plan_tiles(args, {config.tile_m(), config.tile_n, 1, config.blocks_per_sm},
                    device.multiprocessors);
}

}  // namespace

int64_t tensor_core_workspace_bytes(const ForwardArgs& args, const Device& device) {
  return SplitBuffers<float>::bytes(plan_for(args, device), args.shape);
}

Status tensor_core_forward(const ForwardArgs& args, const Launch& launch) {
  const TilePlan plan = plan_for(args, launch.device);
  const Bucket& bucket = bucket_of(args);
  const Status status = (args.dtype == DType::f16 ? bucket.f16 : bucket.bf16)(args, plan, launch);
  if (status != kOk || plan.splits == 1) return status;
  return combine(args, plan, SplitBuffers<float>::in(launch.workspace, plan, args.shape),
                 launch.stream);
}

}  // namespace online_attention::cuda::portable
