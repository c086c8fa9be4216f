// SPDX-License-Identifier: BSD-3-Clause
// The small kernels around the SIMT backward pass: one thread for each element of a gradient.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
#include "cuda/portable/simt_backward.h"

namespace online_attention::cuda::portable {
namespace {

constexpr int kThreads = 256;

// Element `index` of [B, heads, rows, columns], counted in that order.
template <typename Element>
__device__ __forceinline__ Element* element_of(const View& view, int64_t index, int64_t heads,
                                               int64_t rows, int64_t columns) {
  const int64_t row = index / columns, head = row / rows;
  return view.row<Element>(head / heads, head % heads, row % rows) + index % columns;
}

__global__ void __launch_bounds__(kThreads)
    clear_kernel(const __grid_constant__ View dq, const __grid_constant__ Shape shape) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= shape.B * shape.H * shape.S_q * shape.D) return;
  *element_of<float>(dq, index, shape.H, shape.S_q, shape.D) = 0;
}

template <typename Element, typename Real>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ View gradient, const __grid_constant__ Shape shape,
               int64_t columns, const Real* partial, uint32_t parts, Real factor) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t size = shape.B * shape.H_kv * shape.S_kv * columns;
  if (index >= size) return;
  Real sum = 0;
  for (uint32_t part = 0; part < parts; ++part) sum += partial[part * size + index];
  *element_of<Element>(gradient, index, shape.H_kv, shape.S_kv, columns) =
      static_cast<Element>(factor * sum);
}

template <typename Element, typename Real>
Status sum_gradient(const View& gradient, const Shape& shape, int64_t columns, const Real* partial,
                    uint32_t parts, Real factor, const Launch& on) {
  if (gradient.data == nullptr) return kOk;
  const int64_t size = shape.B * shape.H_kv * shape.S_kv * columns;
  return launch(sum_kernel<Element, Real>, ceil_div<int64_t>(size, kThreads), kThreads, 0,
                on.stream, gradient, shape, columns, partial, parts, factor);
}

template <typename Element, typename Real>
Status sum_as(const BackwardArgs& args, const BackwardPlan& plan, const Launch& on) {
  const Shape& s = args.shape;
  const auto buffers = BackwardBuffers<Real>::in(on.workspace, plan, args);
  const Status status = sum_gradient<Element>(args.dk, s, s.D, buffers.dk, plan.parts,
                                              gradient_factor<Real>(args), on);
  if (status != kOk) return status;
  return sum_gradient<Element>(args.dv, s, s.D_v, buffers.dv, plan.parts,
                               args.dropout.keep_scale<Real>(), on);
}

}  // namespace

bool has_aligned_inputs(const BackwardArgs& args) {
  const int64_t bytes = element_bytes(args.dtype);
  return args.shape.D * bytes % 16 == 0 && args.shape.D_v * bytes % 16 == 0 &&
         is_aligned_16(args.q, bytes) && is_aligned_16(args.k, bytes) &&
         is_aligned_16(args.v, bytes) && is_aligned_16(args.dout, bytes);
}

Status sum_parts(const BackwardArgs& args, const BackwardPlan& plan, const Launch& launch) {
  switch (args.dtype) {
    case DType::f16:
      return sum_as<__half, float>(args, plan, launch);
    case DType::bf16:
      return sum_as<__nv_bfloat16, float>(args, plan, launch);
    case DType::f64:
      return sum_as<double, double>(args, plan, launch);
    case DType::f32:
      break;
  }
  return sum_as<float, float>(args, plan, launch);
}

Status clear_dq(const BackwardArgs& args, const Launch& on) {
  const Shape& s = args.shape;
  return launch(clear_kernel, ceil_div<int64_t>(s.B * s.H * s.S_q * s.D, kThreads), kThreads, 0,
                on.stream, args.dq, s);
}

}  // namespace online_attention::cuda::portable
