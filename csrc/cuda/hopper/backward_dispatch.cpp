// SPDX-License-Identifier: BSD-3-Clause
// Which backward calls the Hopper runner takes, and the kernels compiled for their head dims.
#include "cuda/head_dim_bucket.h"
#include "cuda/hopper/addressing.h"
#include "cuda/hopper/backward.h"
#include "cuda/hopper/backward_launch.h"
#include "cuda/hopper/backward_rows.h"
#include "cuda/hopper/wide_backward.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::hopper {
namespace {

using LaunchKernel = Status (*)(const BackwardArgs&, const BackwardPlan&, const BackwardBuffers&,
                                const Launch&);

struct Kernels {
  const BackwardConfig& config;
  LaunchKernel f16, bf16;
};

struct Bucket {
  int64_t head_dim;
  Kernels full, masked;
};

template <int kHeadDim, bool kMasked>
constexpr Kernels kernels() {
  return {kBackward<kHeadDim, kMasked>, launch_backward<__half, kHeadDim, kMasked>,
          launch_backward<__nv_bfloat16, kHeadDim, kMasked>};
}
template <int kHeadDim>
constexpr Bucket bucket() {
  return {kHeadDim, kernels<kHeadDim, false>(), kernels<kHeadDim, true>()};
}

constexpr Bucket kBuckets[] = {bucket<64>(), bucket<96>(), bucket<128>()};

const Kernels& kernels_for(const BackwardArgs& args) {
  const Bucket& bucket = bucket_for(kBuckets, args.shape);
  return args.mask.is_banded() ? bucket.masked : bucket.full;
}

// The sums of dQ, the terms of the rows, the counters; every part begins on a multiple of 256
// bytes.
struct Sizes {
  int64_t dq_sums, terms, added;
  bool finished_by_last;

  Sizes(const BackwardArgs& args, const BackwardConfig& config, const BackwardPlan& plan) {
    const bool ordered = adds_in_order(args, plan);
    dq_sums = plan.dq_tiles() * config.dq_floats() * int64_t{sizeof(float)};
    terms = aligned(plan.dq_tiles() * config.terms_bytes());
    added = ordered ? aligned(counter_place(static_cast<uint32_t>(plan.dq_tiles()), 0) *
                              int64_t{sizeof(int32_t)})
                    : 0;
    finished_by_last = is_finished_by_last(args, plan);
  }
  static int64_t aligned(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }
  int64_t total() const { return dq_sums + 2 * terms + added + int64_t{sizeof(uint32_t)}; }
  BackwardBuffers in(void* workspace) const {
    auto* sums = static_cast<unsigned char*>(workspace);
    auto* lse2 = sums + dq_sums;
    auto* delta = lse2 + terms;
    auto* counters = delta + terms;
    return {.lse2 = reinterpret_cast<float*>(lse2),
            .delta = reinterpret_cast<float*>(delta),
            .dq_sums = reinterpret_cast<float*>(sums),
            .added = added > 0 ? reinterpret_cast<int32_t*>(counters) : nullptr,
            .finished_by_last = finished_by_last,
            .taken = reinterpret_cast<uint32_t*>(counters + added)};
  }
};

}  // namespace

bool runs_backward(const BackwardArgs& args, const Device&) {
  constexpr int64_t kRowsMin = 64;  // fewer leave most of a query tile empty
  const Shape& s = args.shape;
  if (args.is_modified()) return false;
  const bool narrow = s.D <= kBackwardHeadDimMax && s.D_v <= kBackwardHeadDimMax;
  if (s.S_q < kRowsMin || (!narrow && !is_wide(s))) return false;
  const View* of_queries[] = {&args.q, &args.dq};
  const View* of_keys[] = {&args.k, &args.dk};
  const View* of_values[] = {&args.v, &args.dv};
  const View* of_outputs[] = {&args.out, &args.dout};
  const auto addressable = [&](const auto& views, int64_t B, int64_t H, int64_t S, int64_t D) {
    for (const View* view : views) {
      if (view->data == nullptr) continue;
      if (!is_addressable(*view, B, H, S, D, args.deterministic)) return false;
    }
    return true;
  };
  return addressable(of_queries, s.B, s.H, s.S_q, s.D) &&
         addressable(of_keys, s.B, s.H_kv, s.S_kv, s.D) &&
         addressable(of_values, s.B, s.H_kv, s.S_kv, s.D_v) &&
         addressable(of_outputs, s.B, s.H, s.S_q, s.D_v);
}

int64_t backward_workspace_bytes(const BackwardArgs& args, const Device& device) {
  if (is_wide(args.shape)) return wide_backward_workspace_bytes(args, device);
  const BackwardConfig& config = kernels_for(args).config;
  return Sizes(args, config, plan_blocks(args, config, device.multiprocessors)).total();
}

Status backward(const BackwardArgs& args, const Launch& launch) {
  if (is_wide(args.shape)) return wide_backward(args, launch);
  const Kernels& kernels = kernels_for(args);
  const BackwardConfig& config = kernels.config;
  const BackwardPlan plan = plan_blocks(args, config, launch.device.multiprocessors);
  const BackwardBuffers buffers = Sizes(args, config, plan).in(launch.workspace);
  Status status = prepare_rows(args, plan, config, buffers, launch.stream);
  if (status != kOk) return status;
  status = (args.dtype == DType::f16 ? kernels.f16 : kernels.bf16)(args, plan, buffers, launch);
  if (status != kOk || args.dq.data == nullptr || buffers.finished_by_last) return status;
  return finish_dq(args, plan, config, buffers, launch.stream);
}

}  // namespace online_attention::cuda::hopper
