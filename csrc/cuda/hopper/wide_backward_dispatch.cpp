// SPDX-License-Identifier: BSD-3-Clause
// The backward kernels compiled for wide heads.
#include <algorithm>
#include <iterator>

#include "cuda/hopper/wide_backward.h"
#include "cuda/hopper/wide_backward_launch.h"
#include "cuda/hopper/wide_backward_rows.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::hopper {
namespace {

using LaunchKernel = Status (*)(const BackwardArgs&, const BackwardPlan&,
                                const WideBackwardBuffers&, const Launch&);

struct Kernels {
  const WideBackwardConfig& config;
  LaunchKernel f16, bf16;
};

template <int kHeadDim, int kValueDim, bool kMasked>
constexpr Kernels kernels() {
  return {kWideBackward<kHeadDim, kValueDim, kMasked>,
          launch_wide_backward<__half, kHeadDim, kValueDim, kMasked>,
          launch_wide_backward<__nv_bfloat16, kHeadDim, kValueDim, kMasked>};
}

struct Bucket {
  int64_t head_dim, value_dim;
  Kernels full, masked;
};
template <int kHeadDim, int kValueDim>
constexpr Bucket bucket() {
  return {kHeadDim, kValueDim, kernels<kHeadDim, kValueDim, false>(),
          kernels<kHeadDim, kValueDim, true>()};
}

// A call takes the first that holds it.
constexpr Bucket kBuckets[] = {bucket<192, 128>(), bucket<192, 192>(), bucket<256, 256>()};

const Kernels& kernels_for(const BackwardArgs& args) {
  const Bucket& bucket = *std::find_if(
      std::begin(kBuckets), std::end(kBuckets) - 1,
      [&](const Bucket& b) { return args.shape.D <= b.head_dim && args.shape.D_v <= b.value_dim; });
  return args.mask.is_banded() ? bucket.masked : bucket.full;
}

// The sums of dQ, the terms of the rows, the counters of calls that add in order; every part begins
// on a multiple of 256 bytes.
struct Sizes {
  int64_t dq_sums, terms, counters;

  Sizes(const BackwardArgs& args, const WideBackwardConfig& config, const BackwardPlan& plan)
      : dq_sums(plan.dq_tiles() * config.dq_floats() * int64_t{sizeof(float)}),
        terms(plan.dq_tiles() * WideBackwardConfig::kTermsBytes),
        counters(adds_in_order(args) ? counter_bytes(plan) + int64_t{sizeof(uint32_t)} : 0) {}
  static int64_t counter_bytes(const BackwardPlan& plan) {
    return counter_place(static_cast<uint32_t>(plan.dq_tiles()), 0) * int64_t{sizeof(int32_t)};
  }
  int64_t total() const { return dq_sums + 2 * terms + counters; }
  WideBackwardBuffers in(void* workspace) const {
    auto* sums = static_cast<unsigned char*>(workspace);
    auto* lse2 = sums + dq_sums;
    auto* delta = lse2 + terms;
    auto* added = delta + terms;
    WideBackwardBuffers buffers{.lse2 = reinterpret_cast<float*>(lse2),
                                .delta = reinterpret_cast<float*>(delta),
                                .dq_sums = reinterpret_cast<float*>(sums)};
    if (counters == 0) return buffers;
    buffers.added = reinterpret_cast<int32_t*>(added);
    buffers.begun = reinterpret_cast<uint32_t*>(added + counters - sizeof(uint32_t));
    return buffers;
  }
};

}  // namespace

bool is_wide(const Shape& shape) {
  const int64_t widest = std::max(shape.D, shape.D_v);
  return widest > kBackwardHeadDimMax && widest <= kWideBackwardHeadDimMax;
}

int64_t wide_backward_workspace_bytes(const BackwardArgs& args, const Device& device) {
  const BackwardPlan plan = plan_wide_blocks(args, adds_in_order(args), device.multiprocessors);
  return Sizes(args, kernels_for(args).config, plan).total();
}

Status wide_backward(const BackwardArgs& args, const Launch& launch) {
  const Kernels& kernels = kernels_for(args);
  const WideBackwardConfig& config = kernels.config;
  const BackwardPlan plan =
      plan_wide_blocks(args, adds_in_order(args), launch.device.multiprocessors);
  const WideBackwardBuffers buffers = Sizes(args, config, plan).in(launch.workspace);
  Status status = prepare_wide_rows(args, plan, config, buffers, launch.stream);
  if (status != kOk) return status;
  status = (args.dtype == DType::f16 ? kernels.f16 : kernels.bf16)(args, plan, buffers, launch);
  if (status != kOk || args.dq.data == nullptr) return status;
  return finish_wide_dq(args, plan, config, buffers, launch.stream);
}

}  // namespace online_attention::cuda::hopper
