// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/wide_backward_rows.h"

#include "cuda/hopper/backward_row_parts.cuh"
#include "cuda/launch.cuh"

namespace online_attention::cuda::hopper {
namespace {

// Whether the query tile of a row sees any key. Where key tiles add in order, the first of them
// stores, but to such a tile nobody comes.
__device__ __forceinline__ bool has_adders(const BackwardArgs& args, int32_t s) {
  constexpr int32_t kTileM = WideBackwardConfig::tile_m;
  const int32_t begin = s / kTileM * kTileM;
  const int32_t end = min(begin + kTileM, static_cast<int32_t>(args.shape.S_q));
  return args.mask.kv_range(begin, end).size() > 0;
}

// A warp for each row. What it reads and zeroes does not depend on other rows, so that a row's
// terms are the same in any batch.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads)
    prepare_wide_rows_kernel(const __grid_constant__ BackwardArgs args,
                             const __grid_constant__ WideBackwardBuffers buffers, int64_t rows,
                             int32_t head_rows, int row_sums) {
  const Shape& shape = args.shape;
  const int lane = threadIdx.x % 32;
  const uint32_t block = gridDim.x - 1 - blockIdx.x;  // what is written last is used first
  const int64_t row = int64_t{block} * (kRowThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t head = row / head_rows;
  const auto s = static_cast<int32_t>(row % head_rows);
  float sum = 0;
  const bool exists = s < shape.S_q;
  if (exists && lane * kVector < shape.D_v) {
    const int64_t b = head / shape.H, h = head % shape.H;
    sum = delta_part<Element>(args, b, h, s, lane);
  }
  if (buffers.added != nullptr) {
    constexpr int kParts = WideBackwardConfig::kBlocks;
    if (row == 0 && lane == 0) *buffers.begun = 0;
    if (s % WideBackwardConfig::tile_m == 0 && lane < kParts) {
      const auto tile = static_cast<uint32_t>(row / WideBackwardConfig::tile_m);
      buffers.added[counter_place(tile, lane)] = 0;
    }
  }
  if (buffers.added == nullptr || !has_adders(args, s)) {
    auto* zeros = reinterpret_cast<float4*>(buffers.dq_sums + row * row_sums);
    for (int i = lane; i < row_sums / 4; i += 32) zeros[i] = float4{};
  }
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (lane != 0) return;
  const int64_t place = row - s + BackwardConfig::term_place(s);
  store_terms(args, buffers, head, s, place, sum);
}

// A block for each query tile of each head, which scales, rounds and writes its dQ.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads)
    finish_wide_dq_kernel(const __grid_constant__ BackwardArgs args, const float* sums,
                          WideBackwardConfig config, int32_t q_tiles) {
  extern __shared__ __align__(16) unsigned char smem[];
  // What was added to last is still in the cache.
  const uint32_t block = gridDim.x - 1 - blockIdx.x;
  auto* tile = reinterpret_cast<Element*>(smem);
  const int pitch = config.boxes() * WideBackwardConfig::kColumns + kVector;  // in elements
  const auto factor = static_cast<float>(args.factor);
  const auto* fours = reinterpret_cast<const float4*>(sums + int64_t{block} * config.dq_floats());
  for (int i = threadIdx.x; i < config.dq_floats() / 4; i += kRowThreads) {
    const float4 x = fours[i];
    const float four[4] = {x.x, x.y, x.z, x.w};
    const DqPlace at = dq_place(config, 4 * i);
    Element* target = tile + at.query * pitch + at.column;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      target[e / 2 * 8 * pitch + e % 2] = static_cast<Element>(four[e] * factor);
    }
  }
  __syncthreads();
  store_dq_rows(args, tile, pitch, block, q_tiles, config.tile_m);
}

template <typename Element>
Status prepare_as(const BackwardArgs& args, const BackwardPlan& plan,
                  const WideBackwardConfig& config, const WideBackwardBuffers& buffers,
                  void* stream) {
  const auto head_rows = static_cast<int32_t>(plan.q_tiles * config.tile_m);
  const int64_t rows = args.shape.B * args.shape.H * head_rows;
  return launch(prepare_wide_rows_kernel<Element>, ceil_div<int64_t>(rows, kRowThreads / 32),
                kRowThreads, 0, stream, args, buffers, rows, head_rows,
                config.boxes() * WideBackwardConfig::kColumns);
}

template <typename Element>
Status finish_as(const BackwardArgs& args, const BackwardPlan& plan,
                 const WideBackwardConfig& config, const WideBackwardBuffers& buffers,
                 void* stream) {
  const int bytes =
      config.tile_m * (config.boxes() * WideBackwardConfig::kColumns + kVector) * sizeof(Element);
  return launch(finish_wide_dq_kernel<Element>, plan.dq_tiles(), kRowThreads, bytes, stream, args,
                static_cast<const float*>(buffers.dq_sums), config,
                static_cast<int32_t>(plan.q_tiles));
}

}  // namespace

Status prepare_wide_rows(const BackwardArgs& args, const BackwardPlan& plan,
                         const WideBackwardConfig& config, const WideBackwardBuffers& buffers,
                         void* stream) {
  const auto prepare = args.dtype == DType::f16 ? prepare_as<__half> : prepare_as<__nv_bfloat16>;
  return prepare(args, plan, config, buffers, stream);
}

Status finish_wide_dq(const BackwardArgs& args, const BackwardPlan& plan,
                      const WideBackwardConfig& config, const WideBackwardBuffers& buffers,
                      void* stream) {
  const auto finish = args.dtype == DType::f16 ? finish_as<__half> : finish_as<__nv_bfloat16>;
  return finish(args, plan, config, buffers, stream);
}

}  // namespace online_attention::cuda::hopper
