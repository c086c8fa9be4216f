// SPDX-License-Identifier: BSD-3-Clause
// Plans a backward call of the tensor-core runner and sends it to the kernel compiled for its head
// dims and the device's shared memory.
#include "cuda/backward_delta.h"
#include "cuda/head_dim_bucket.h"
#include "cuda/memory.h"
#include "cuda/portable/backward.h"
#include "cuda/portable/tensor_core_backward.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::portable {
namespace {

using LaunchKernel = Status (*)(const BackwardArgs&, const BackwardPlan&, const BackwardBuffers&,
                                SmemClass, const Launch&);

struct Bucket {
  int64_t head_dim;
  const BackwardConfig& large;
  const BackwardConfig& medium;
  const BackwardConfig& turing;
  struct Kernels {
    LaunchKernel main, store_dq;
  } f16, bf16;
};

template <typename Element, int kHeadDim, bool kModified>
constexpr Bucket::Kernels kernels() {
  return {launch_tensor_core_backward<Element, kHeadDim, kModified>,
          launch_store_dq<Element, kHeadDim>};
}

template <int kHeadDim, bool kModified>
constexpr Bucket bucket() {
  return {kHeadDim,
          kBackward<kHeadDim, SmemClass::large>,
          kBackward<kHeadDim, SmemClass::medium>,
          kBackward<kHeadDim, SmemClass::turing>,
          kernels<__half, kHeadDim, kModified>(),
          kernels<__nv_bfloat16, kHeadDim, kModified>()};
}

constexpr Bucket kBuckets[] = {bucket<64, false>(), bucket<96, false>(), bucket<128, false>(),
                               bucket<192, false>(), bucket<256, false>()};
// Of calls with a bias or dropout, as in the forward.
constexpr Bucket kModifiedBuckets[] = {bucket<64, true>(), bucket<128, true>(),
                                       bucket<256, true>()};

const Bucket& bucket_of(const BackwardArgs& args) {
  return args.is_modified() ? bucket_for(kModifiedBuckets, args.shape)
                            : bucket_for(kBuckets, args.shape);
}

SmemClass smem_class(const Device& device) {
  if (device.arch < 80) return SmemClass::turing;
  const bool large = device.arch >= 90 && device.smem_per_block >= smem_limit(SmemClass::large);
  return large ? SmemClass::large : SmemClass::medium;
}

const BackwardConfig& config_of(const Bucket& bucket, SmemClass size) {
  return size == SmemClass::large    ? bucket.large
         : size == SmemClass::medium ? bucket.medium
                                     : bucket.turing;
}

BackwardPlan plan_for(const BackwardArgs& args, const Device& device) {
  const BackwardConfig& config = config_of(bucket_of(args), smem_class(device));
  return plan_backward(args, config.tile_m, config.tile_n, device.multiprocessors);
}

// delta and lse2, [B, H, S_q] each, padded so that what follows is aligned; then the sums of dQ, a
// tile of the bucket's width for each query tile; then the turns.
struct Sizes {
  int64_t row_terms = 0, dq_sums = 0, turns = 0;

  Sizes(const BackwardArgs& args, const BackwardPlan& plan) {
    const Shape& s = args.shape;
    row_terms = ceil_div<int64_t>(s.B * s.H * s.S_q * sizeof(float), 256) * 256;
    if (args.dq.data == nullptr) return;
    dq_sums = plan.dq_tiles() * plan.tile_m * bucket_of(args).head_dim * sizeof(float);
    if (args.deterministic) turns = (1 + plan.dq_tiles()) * sizeof(int32_t);
  }
  int64_t total() const { return 2 * row_terms + dq_sums + turns; }
  BackwardBuffers in(void* workspace) const {
    auto* bytes = static_cast<unsigned char*>(workspace);
    BackwardBuffers buffers;
    buffers.delta = reinterpret_cast<float*>(bytes);
    buffers.lse2 = reinterpret_cast<float*>(bytes + row_terms);
    if (dq_sums > 0) buffers.dq_sums = reinterpret_cast<float*>(bytes + 2 * row_terms);
    if (turns > 0) buffers.turns = reinterpret_cast<int32_t*>(bytes + 2 * row_terms + dq_sums);
    return buffers;
  }
};

bool fits(const BackwardArgs& args, const Device& device) {
  return config_of(bucket_of(args), smem_class(device)).head_dim > 0;
}

}  // namespace

int64_t tensor_core_backward_workspace_bytes(const BackwardArgs& args, const Device& device) {
  if (!fits(args, device)) return simt_backward_workspace_bytes(args, device);
  return Sizes(args, plan_for(args, device)).total();
}

Status tensor_core_backward(const BackwardArgs& args, const Launch& launch) {
  if (!fits(args, launch.device)) return simt_backward(args, launch);
  const BackwardPlan plan = plan_for(args, launch.device);
  const Sizes sizes(args, plan);
  const BackwardBuffers buffers = sizes.in(launch.workspace);
  Status status = backward_row_terms(args, buffers.delta, buffers.lse2, launch.stream);
  if (status != kOk) return status;
  if (buffers.dq_sums != nullptr) {
    status = fill_zero(buffers.dq_sums, sizes.dq_sums + sizes.turns, launch.stream);
    if (status != kOk) return status;
  }
  const Bucket& bucket = bucket_of(args);
  const Bucket::Kernels& kernels = args.dtype == DType::f16 ? bucket.f16 : bucket.bf16;
  const SmemClass size = smem_class(launch.device);
  status = kernels.main(args, plan, buffers, size, launch);
  if (status != kOk || buffers.dq_sums == nullptr) return status;
  return kernels.store_dq(args, plan, buffers, size, launch);
}

}  // namespace online_attention::cuda::portable
