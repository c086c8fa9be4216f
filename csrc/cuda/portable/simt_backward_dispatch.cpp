// SPDX-License-Identifier: BSD-3-Clause
// Plans a call of the SIMT backward pass and sends it to the kernels compiled for its dtype and
// head dims.
#include <algorithm>

#include "cuda/backward_delta.h"
#include "cuda/portable/backward.h"
#include "cuda/portable/simt_backward.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::portable {
namespace {

struct Kernels {
  BackwardTile (*tile)();
  Status (*keys)(const BackwardArgs&, const BackwardPlan&, const Launch&);
  Status (*queries)(const BackwardArgs&, const BackwardPlan&, const Launch&);
};

template <typename Element, int kColumns, bool kAligned, bool kModified>
constexpr Kernels kKernels = {simt_backward_tile<Element, kColumns>,
                              launch_simt_backward_keys<Element, kColumns, kAligned, kModified>,
                              launch_simt_backward_queries<Element, kColumns, kAligned, kModified>};

// The kernels for a bias or dropout take calls without, too, somewhat slower: what is rare has no
// others, for a small library.
template <typename Element, int kColumns>
constexpr Kernels kRareKernels = kKernels<Element, kColumns, false, true>;

template <int kColumns>
Kernels fp32_kernels(bool modified) {
  return modified ? kKernels<float, kColumns, true, true> : kKernels<float, kColumns, true, false>;
}

Kernels kernels_of(const BackwardArgs& args) {
  switch (args.dtype) {
    case DType::f16:
      return kRareKernels<__half, 128>;
    case DType::bf16:
      return kRareKernels<__nv_bfloat16, 128>;
    case DType::f64:
      return kRareKernels<double, 64>;
    case DType::f32:
      break;
  }
  if (!has_aligned_inputs(args)) return kRareKernels<float, 64>;
  const bool modified = args.is_modified();
  return std::max(args.shape.D, args.shape.D_v) <= 64 ? fp32_kernels<64>(modified)
                                                      : fp32_kernels<128>(modified);
}

constexpr int kBlocksPerMultiprocessor = 2;
// Blocks that run one after the other: the more, the less of the device idles at the end.
constexpr int kRounds = 4;
// A part walks over at least this many tiles of queries: fewer, and summing costs more than the
// parts save.
constexpr int64_t kMinTilesPerPart = 4;
constexpr int64_t kMaxParts = 64;
// Deterministic parts depend on lengths alone: they are meant for this many multiprocessors and a
// batch of one, and fewer, since they take memory and time in larger batches too.
constexpr int kDeterministicMultiprocessors = 64;
constexpr int64_t kMaxDeterministicParts = 4;

int64_t wanted_parts(const BackwardArgs& args, const BackwardPlan& plan, const BackwardTile& tile,
                     int multiprocessors) {
  const Shape& s = args.shape;
  const int64_t tiles = s.group() * ceil_div<int64_t>(s.S_q, tile.m);
  const bool fixed = args.deterministic;
  const int64_t most = std::min(tiles / kMinTilesPerPart,  //
                                fixed ? kMaxDeterministicParts : kMaxParts);
  const int64_t wanted = kBlocksPerMultiprocessor * (fixed ? kDeterministicMultiprocessors
                                                           : int64_t{kRounds} * multiprocessors);
  const int64_t blocks = (fixed ? 1 : s.B) * s.H_kv * plan.key_tiles * plan.column_blocks;
  return std::clamp<int64_t>(wanted / blocks, 1, std::max<int64_t>(most, 1));
}

BackwardPlan plan_for(const BackwardArgs& args, const Device& device) {
  const Shape& s = args.shape;
  const BackwardTile tile = kernels_of(args).tile();
  BackwardPlan plan;
  plan.q_tiles = static_cast<uint32_t>(ceil_div<int64_t>(s.S_q, tile.m));
  plan.key_tiles = static_cast<uint32_t>(ceil_div<int64_t>(s.S_kv, tile.n));
  plan.column_blocks = static_cast<uint32_t>(ceil_div<int64_t>(std::max(s.D, s.D_v), tile.columns));
  plan.parts = static_cast<uint32_t>(wanted_parts(args, plan, tile, device.multiprocessors));
  const bool needs_keys = args.dk.data != nullptr || args.dv.data != nullptr;
  plan.queries_apart = args.deterministic || args.dtype != DType::f32 || !needs_keys;
  return plan;
}

Status delta_of(const BackwardArgs& args, const BackwardPlan& plan, const Launch& launch) {
  if (args.dtype != DType::f64) {
    const auto buffers = BackwardBuffers<float>::in(launch.workspace, plan, args);
    return backward_delta(args, buffers.delta, launch.stream);
  }
  const auto buffers = BackwardBuffers<double>::in(launch.workspace, plan, args);
  return backward_delta(args, buffers.delta, launch.stream);
}

}  // namespace

int64_t simt_backward_workspace_bytes(const BackwardArgs& args, const Device& device) {
  const BackwardPlan plan = plan_for(args, device);
  return args.dtype == DType::f64 ? BackwardBuffers<double>::bytes(plan, args)
                                  : BackwardBuffers<float>::bytes(plan, args);
}

Status simt_backward(const BackwardArgs& args, const Launch& launch) {
  const BackwardPlan plan = plan_for(args, launch.device);
  const Kernels kernels = kernels_of(args);
  const bool needs_dq = args.dq.data != nullptr, needs_dk = args.dk.data != nullptr;
  const bool needs_dv = args.dv.data != nullptr;

  Status status = kOk;
  if (needs_dq || needs_dk) status = delta_of(args, plan, launch);
  if (status == kOk && needs_dq && !plan.queries_apart) status = clear_dq(args, launch);
  if (status == kOk && (needs_dk || needs_dv)) status = kernels.keys(args, plan, launch);
  if (status == kOk && plan.parts > 1 && (needs_dk || needs_dv)) {
    status = sum_parts(args, plan, launch);
  }
  if (status == kOk && needs_dq && plan.queries_apart) {
    status = kernels.queries(args, plan, launch);
  }
  return status;
}

}  // namespace online_attention::cuda::portable
