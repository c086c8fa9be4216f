// SPDX-License-Identifier: BSD-3-Clause
// Plans a call of the SIMT runner and sends it to the kernel compiled for its dtype and D_v.
#include "cuda/combine.h"
#include "cuda/portable/forward.h"
#include "cuda/portable/simt_forward.h"

// Named, never defined here: host code picks kernels by element type without CUDA's headers.
struct __half;
struct __nv_bfloat16;

namespace online_attention::cuda::portable {
namespace {

struct Kernel {
  TileShape (*tile)(int64_t D_v);
  Status (*launch)(const ForwardArgs&, const TilePlan&, const Launch&);
};

template <typename Element, int kOutColumns, int kKeys>
constexpr Kernel kernel() {
  return {simt_tile<Element, kOutColumns, kKeys>, launch_simt<Element, kOutColumns, kKeys>};
}

// With few query rows PyTorch sums as a tree, and the long sums of the fast tiles would exceed
// twice its error; the arithmetic is not what takes the time then.
constexpr int64_t kFewRows = 64;

Kernel kernel_of(const ForwardArgs& args) {
  switch (args.dtype) {
    case DType::f16:
      return kernel<__half, 128, 64>();
    case DType::bf16:
      return kernel<__nv_bfloat16, 128, 64>();
    case DType::f64:
      return kernel<double, 64, 32>();
    case DType::f32:
      break;
  }
  if (args.shape.S_q * args.shape.group() <= kFewRows) return kernel<float, 128, 64>();
  return args.shape.D_v <= 64 ? kernel<float, 64, 128>() : kernel<float, 128, 128>();
}

TilePlan plan_for(const ForwardArgs& args, const Device& device) {
  return plan_tiles(args, kernel_of(args).tile(args.shape.D_v), device.multiprocessors);
}

template <typename Real>
Status combine_splits(const ForwardArgs& args, const TilePlan& plan, const Launch& launch) {
  return combine(args, plan, SplitBuffers<Real>::in(launch.workspace, plan, args.shape),
                 launch.stream);
}

}  // namespace

int64_t simt_workspace_bytes(const ForwardArgs& args, const Device& device) {
  const TilePlan plan = plan_for(args, device);
  return args.dtype == DType::f64 ? SplitBuffers<double>::bytes(plan, args.shape)
                                  : SplitBuffers<float>::bytes(plan, args.shape);
}

Status simt_forward(const ForwardArgs& args, const Launch& launch) {
  const TilePlan plan = plan_for(args, launch.device);
  const Status status = kernel_of(args).launch(args, plan, launch);
  if (status != kOk || plan.splits == 1) return status;
  return args.dtype == DType::f64 ? combine_splits<double>(args, plan, launch)
                                  : combine_splits<float>(args, plan, launch);
}

}  // namespace online_attention::cuda::portable
