// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/backward_delta.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/softmax_row.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda {
namespace {

constexpr int kThreads = 128;

template <typename Element, int kVector>
struct alignas(sizeof(Element) * kVector) Pack {
  Element e[kVector];
};

// From `row`, kVector elements; those from `length` on are 0.
template <bool kAligned, typename Element, int kVector>
__device__ __forceinline__ Pack<Element, kVector> read(const Element* row, int64_t d,
                                                       int64_t length) {
  using Packed = Pack<Element, kVector>;
  if constexpr (kAligned) {
    return *reinterpret_cast<const Packed*>(row + d);
  } else {
    Packed pack;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      pack.e[e] = d + e < length ? row[d + e] : static_cast<Element>(0.0f);
    }
    return pack;
  }
}

// `lanes` threads of a warp, a power of two, share a row and read it kVector elements at a time.
// Each row's sum is taken in the same order in every run and from any address.
template <typename Element, typename Real, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(const __grid_constant__ BackwardArgs args, Real* delta, Real* lse2, int lanes) {
  constexpr int kVector = 16 / sizeof(Element);
  const Shape& shape = args.shape;
  const int lane = threadIdx.x % lanes;
  const int64_t rows = shape.B * shape.H * shape.S_q;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  const bool exists = row < rows;  // threads without a row stay for the shuffles

  Real sum = 0;
  if (exists) {
    const int64_t head = row / shape.S_q, s = row % shape.S_q;
    const int64_t b = head / shape.H, h = head % shape.H;
    const Element* out = args.out.template row<const Element>(b, h, s);
    const Element* dout = args.dout.template row<const Element>(b, h, s);
    for (int64_t d = lane * kVector; d < shape.D_v; d += lanes * kVector) {
      const auto x = read<kAligned, Element, kVector>(out, d, shape.D_v);
      const auto y = read<kAligned, Element, kVector>(dout, d, shape.D_v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        sum += static_cast<Real>(x.e[e]) * static_cast<Real>(y.e[e]);
      }
    }
  }
  for (int other = lanes / 2; other > 0; other /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, other);
  }
  if (!exists || lane != 0) return;
  const Real dlse = args.dlse == nullptr ? Real(0) : static_cast<const Real*>(args.dlse)[row];
  delta[row] = sum - dlse;  // (E28)
  if (lse2 == nullptr) return;
  const Real lse = static_cast<const Real*>(args.lse)[row];
  lse2[row] = lse == -kInfinity<Real> ? kInfinity<Real> : SoftmaxRow<Real>::from_lse(lse).m;
}

template <typename Element, bool kAligned, typename Real>
Status launch_delta(const BackwardArgs& args, Real* delta, Real* lse2, void* stream) {
  constexpr int64_t kVector = 16 / sizeof(Element);
  int lanes = 1;
  while (lanes < 32 && lanes * kVector < args.shape.D_v) lanes *= 2;
  const int64_t rows = args.shape.B * args.shape.H * args.shape.S_q;
  return launch(delta_kernel<Element, Real, kAligned>, ceil_div<int64_t>(rows, kThreads / lanes),
                kThreads, 0, stream, args, delta, lse2, lanes);
}

template <typename Element, typename Real>
Status delta_as(const BackwardArgs& args, Real* delta, Real* lse2, void* stream) {
  constexpr int64_t kBytes = sizeof(Element);
  const bool aligned = args.shape.D_v * kBytes % 16 == 0 && is_aligned_16(args.out, kBytes) &&
                       is_aligned_16(args.dout, kBytes);
  return aligned ? launch_delta<Element, true>(args, delta, lse2, stream)
                 : launch_delta<Element, false>(args, delta, lse2, stream);
}

}  // namespace

Status backward_row_terms(const BackwardArgs& args, float* delta, float* lse2, void* stream) {
  switch (args.dtype) {
    case DType::f16:
      return delta_as<__half>(args, delta, lse2, stream);
    case DType::bf16:
      return delta_as<__nv_bfloat16>(args, delta, lse2, stream);
    default:
      return delta_as<float>(args, delta, lse2, stream);
  }
}

Status backward_delta(const BackwardArgs& args, float* delta, void* stream) {
  return backward_row_terms(args, delta, nullptr, stream);
}

Status backward_delta(const BackwardArgs& args, double* delta, void* stream) {
  return delta_as<double, double>(args, delta, nullptr, stream);
}

}  // namespace online_attention::cuda
