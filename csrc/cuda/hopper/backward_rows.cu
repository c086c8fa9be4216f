// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/backward_rows.h"

#include "cuda/hopper/backward_row_parts.cuh"
#include "cuda/launch.cuh"

namespace online_attention::cuda::hopper {
namespace {

// 8 threads share a row of 64 columns, 16 one of 128. What a row reads does not depend on the
// others, so that a row's terms are the same in any batch.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads)
    prepare_rows_kernel(const __grid_constant__ BackwardArgs args,
                        const __grid_constant__ BackwardBuffers buffers, uint32_t rows,
                        uint32_t head_rows, int32_t tile_m, int lanes) {
  const Shape& shape = args.shape;
  const int lane = threadIdx.x % lanes;
  const uint32_t block = gridDim.x - 1 - blockIdx.x;  // what is read last is used first
  const uint32_t row = block * (kRowThreads / lanes) + threadIdx.x / lanes;
  if (row == 0 && lane == 0) *buffers.taken = 0;
  if (row >= rows) return;  // whole rows, of half a warp at least
  const uint32_t head = row / head_rows, heads = static_cast<uint32_t>(shape.H);
  const auto s = static_cast<int32_t>(row % head_rows);
  const int64_t b = head / heads, h = head % heads;
  float sum = 0;
  const bool exists = s < shape.S_q;
  if (exists && lane * kVector < shape.D_v) {
    sum = delta_part<Element>(args, b, h, s, lane);
  }
  if (buffers.added != nullptr) {
    if (s % tile_m == 0 && lane < BackwardConfig::kGroups) {
      buffers.added[counter_place(row / static_cast<uint32_t>(tile_m), lane)] = 0;
    }
  } else {
    float4* zeros = reinterpret_cast<float4*>(buffers.dq_sums + int64_t{row} * lanes * kVector);
    zeros[lane] = float4{};
    zeros[lane + lanes] = float4{};
  }
  if (args.mask.is_banded() && exists && lane * kVector < shape.D && args.dq.data != nullptr) {
    // A query tile that sees no key gets its dQ here, nobody else comes by.
    const int32_t q_begin = s / tile_m * tile_m;
    const int32_t q_end = min(q_begin + tile_m, static_cast<int32_t>(shape.S_q));
    if (args.mask.kv_range(q_begin, q_end).size() == 0) {
      *reinterpret_cast<uint4*>(args.dq.template row<Element>(b, h, s) + lane * kVector) = uint4{};
    }
  }
  const uint32_t among = lanes == 32 ? ~0u : ((1u << lanes) - 1) << (threadIdx.x % 32u - lane);
  for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(among, sum, other);
  if (lane != 0) return;
  const int64_t place = int64_t{row} - s + BackwardConfig::term_place(s);
  store_terms(args, buffers, head, s, place, sum);
}

// A block for each query tile of each head, which scales, rounds and writes its dQ.
template <typename Element>
__global__ void __launch_bounds__(kRowThreads)
    finish_dq_kernel(const __grid_constant__ BackwardArgs args, const float* sums,
                     BackwardConfig config, int32_t q_tiles) {
  extern __shared__ __align__(16) unsigned char smem[];
  const uint32_t block =
      gridDim.x - 1 - blockIdx.x;  // what was added to last is still in the cache
  auto* tile = reinterpret_cast<Element*>(smem);
  const int pitch = config.boxes() * BackwardConfig::kColumns + kVector;  // in elements
  const auto factor = static_cast<float>(args.factor);
  const auto* fours = reinterpret_cast<const float4*>(sums + int64_t{block} * config.dq_floats());
  for (int i = threadIdx.x; i < config.dq_floats() / 4; i += kRowThreads) {
    const float4 x = fours[i];
    const float four[4] = {x.x, x.y, x.z, x.w};
    const DqPlace at = dq_place(config, 4 * i);
    Element* target = tile + at.query * pitch + at.column;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      target[e % 2 * pitch + e / 2 * 8] = static_cast<Element>(four[e] * factor);
    }
  }
  __syncthreads();
  store_dq_rows(args, tile, pitch, block, q_tiles, config.tile_m);
}

template <typename Element>
Status prepare_as(const BackwardArgs& args, const BackwardPlan& plan, const BackwardConfig& config,
                  const BackwardBuffers& buffers, void* stream) {
  const int lanes = config.boxes() * BackwardConfig::kColumns / kVector;
  const auto head_rows = static_cast<uint32_t>(plan.q_tiles * config.tile_m);
  // Fewer than 2^32: the sums of so many rows are larger than any memory.
  const auto rows = static_cast<uint32_t>(args.shape.B * args.shape.H * head_rows);
  return launch(prepare_rows_kernel<Element>, ceil_div<int64_t>(rows, kRowThreads / lanes),
                kRowThreads, 0, stream, args, buffers, rows, head_rows, config.tile_m, lanes);
}

template <typename Element>
Status finish_as(const BackwardArgs& args, const BackwardPlan& plan, const BackwardConfig& config,
                 const BackwardBuffers& buffers, void* stream) {
  const int bytes =
      config.tile_m * (config.boxes() * BackwardConfig::kColumns + kVector) * sizeof(Element);
  return launch(finish_dq_kernel<Element>, plan.dq_tiles(), kRowThreads, bytes, stream, args,
                static_cast<const float*>(buffers.dq_sums), config,
                static_cast<int32_t>(plan.q_tiles));
}

}  // namespace

Status prepare_rows(const BackwardArgs& args, const BackwardPlan& plan,
                    const BackwardConfig& config, const BackwardBuffers& buffers, void* stream) {
  const auto prepare = args.dtype == DType::f16 ? prepare_as<__half> : prepare_as<__nv_bfloat16>;
  return prepare(args, plan, config, buffers, stream);
}

Status finish_dq(const BackwardArgs& args, const BackwardPlan& plan, const BackwardConfig& config,
                 const BackwardBuffers& buffers, void* stream) {
  const auto finish = args.dtype == DType::f16 ? finish_as<__half> : finish_as<__nv_bfloat16>;
  return finish(args, plan, config, buffers, stream);
}

}  // namespace online_attention::cuda::hopper
