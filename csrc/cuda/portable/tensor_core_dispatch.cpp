// SPDX-License-Identifier: BSD-3-Clause
// Plans a call of the tensor-core runner and sends it to the kernel compiled for its head dims.
#include <algorithm>
#include <iterator>

#include "cuda/combine.h"
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
  const ForwardConfig& ampere;
  const ForwardConfig& turing;
  LaunchKernel f16, bf16;
};

template <int kHeadDim>
constexpr Bucket bucket() {
  return {kHeadDim, kAmpere<kHeadDim>, kTuring<kHeadDim>, launch_tensor_core<__half, kHeadDim>,
          launch_tensor_core<__nv_bfloat16, kHeadDim>};
}

constexpr Bucket kBuckets[] = {bucket<64>(), bucket<96>(), bucket<128>(), bucket<192>(),
                               bucket<256>()};

// The registry sends no head dim above the last bucket's.
const Bucket& bucket_of(const Shape& shape) {
  const int64_t head_dim = std::max(shape.D, shape.D_v);
  return *std::find_if(std::begin(kBuckets), std::end(kBuckets) - 1,
                       [&](const Bucket& b) { return head_dim <= b.head_dim; });
}

TilePlan plan_for(const ForwardArgs& args, const Device& device) {
  const Bucket& bucket = bucket_of(args.shape);
  const ForwardConfig& config = device.arch < 80 ? bucket.turing : bucket.ampere;
  return plan_tiles(args, {config.tile_m(), config.tile_n, 1, config.blocks_per_sm},
                    device.multiprocessors);
}

}  // namespace

int64_t tensor_core_workspace_bytes(const ForwardArgs& args, const Device& device) {
  return SplitBuffers<float>::bytes(plan_for(args, device), args.shape);
}

Status tensor_core_forward(const ForwardArgs& args, const Launch& launch) {
  if (args.bias.exists() || args.dropout.exists()) return "masks and dropout are not built here.";
  const TilePlan plan = plan_for(args, launch.device);
  const Bucket& bucket = bucket_of(args.shape);
  const Status status = (args.dtype == DType::f16 ? bucket.f16 : bucket.bf16)(args, plan, launch);
  if (status != kOk || plan.splits == 1) return status;
  return combine(args, plan, SplitBuffers<float>::in(launch.workspace, plan, args.shape),
                 launch.stream);
}

}  // namespace online_attention::cuda::portable
