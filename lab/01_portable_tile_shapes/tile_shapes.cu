// SPDX-License-Identifier: BSD-3-Clause
// Times the portable tensor-core kernel for a table of tile shapes. See README.md.
//
//   nvcc -std=c++20 -O3 -I csrc -gencode arch=compute_90,code=sm_90 -o tile_shapes
//       lab/01_portable_tile_shapes/tile_shapes.cu csrc/cuda/tile_plan.cpp && ./tile_shapes
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/portable/tensor_core_forward.cuh"

namespace {

using namespace online_attention;
using namespace online_attention::cuda;
using namespace online_attention::cuda::portable;
using Element = __nv_bfloat16;

constexpr ForwardConfig kShapes[] = {
    // head dim, row atoms, warps, keys, blocks per SM, Q in registers
    {128, 2, 4, 64, 2, false}, {128, 2, 4, 48, 2, false}, {128, 2, 4, 32, 2, false},
    {128, 1, 4, 64, 3, true},  {128, 1, 4, 64, 3, false}, {128, 1, 8, 64, 2, false},
    {128, 1, 4, 64, 4, false}, {64, 2, 4, 64, 2, true},   {64, 2, 4, 128, 2, false},
    {64, 2, 4, 96, 2, true},   {64, 2, 4, 64, 3, false},  {64, 2, 4, 32, 3, true},
    {64, 1, 4, 128, 3, true},  {64, 1, 4, 64, 4, true},   {64, 1, 8, 64, 2, true},
};
constexpr int kCount = std::size(kShapes);

template <int kIndex>
__global__ void __launch_bounds__(kShapes[kIndex].threads(), kShapes[kIndex].blocks_per_sm)
    shape_kernel(const __grid_constant__ TensorCoreCall call) {
  extern __shared__ __align__(128) unsigned char smem[];
  constexpr ForwardConfig kConfig = kShapes[kIndex];
  const uint32_t address = ptx::shared_address(smem);
  WarpTile<Element, kConfig> warp;
  attend<false>(call, address, warp);
  const BlockContext<Element, kConfig> block(call, ptx::block_index(), address);
  warp.normalise();
  store_rows(warp, block, call.aligned);
}

// About normal: the sum of four uniform numbers.
__global__ void fill(Element* x, size_t size, unsigned seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < size;
       i += size_t{gridDim.x} * blockDim.x) {
    unsigned bits = static_cast<unsigned>(i) * 747796405u + seed;
    float sum = 0;
    for (int j = 0; j < 4; ++j) {
      bits = (bits ^ bits >> 16) * 0x7feb352du;
      bits = (bits ^ bits >> 15) * 0x846ca68bu;
      bits ^= bits >> 16;
      sum += static_cast<float>(bits & 0xffffff) / 16777216.0f - 0.5f;
    }
    x[i] = __float2bfloat16(sum * 1.732f);
  }
}

struct Buffers {
  Element *q, *k, *v, *out;
  float* lse;
};
constexpr int64_t kTokens = 16384, kWidth = 2048;  // H * D

Buffers allocate() {
  Buffers b{};
  for (Element** x : {&b.q, &b.k, &b.v, &b.out}) cudaMalloc(x, kTokens * kWidth * sizeof(Element));
  cudaMalloc(&b.lse, kTokens * 64 * sizeof(float));
  unsigned seed = 1;
  for (Element* x : {b.q, b.k, b.v}) fill<<<1024, 256>>>(x, kTokens * kWidth, seed++);
  return b;
}

// TFLOP/s, the median of five.
template <int kIndex>
double measure(const Buffers& b, int64_t S, bool causal) {
  constexpr ForwardConfig kConfig = kShapes[kIndex];
  constexpr int64_t D = kConfig.head_dim;
  TensorCoreCall call{};
  ForwardArgs& args = call.args;
  args.dtype = DType::bf16;
  args.shape = {kTokens / S, kWidth / D, kWidth / D, S, S, D, D};
  const auto view = [&](Element* x) { return View{x, S * kWidth, D, kWidth}; };
  args.q = view(b.q), args.k = view(b.k), args.v = view(b.v), args.out = view(b.out);
  args.lse = b.lse;
  const auto length = static_cast<int32_t>(S);
  args.mask = causal ? Mask::causal(length, length, Alignment::bottom_right) : Mask::full(length);
  args.scale = ScoreScale::from(1 / std::sqrt(double{D}), DType::bf16);
  call.sign = 1, call.scale_log2 = static_cast<float>(args.scale.log2), call.aligned = true;
  args.batch_invariant = true;  // no splits
  call.plan = plan_tiles(args, {kConfig.tile_m(), kConfig.tile_n, 1, kConfig.blocks_per_sm}, 132);

  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  std::vector<float> samples;
  const int launches = S > 4000 ? 2 : 6;
  for (int round = 0; round < 6; ++round) {
    cudaEventRecord(begin);
    for (int i = 0; i < launches; ++i) {
      shape_kernel<kIndex>
          <<<static_cast<unsigned>(call.plan.tiles()), kConfig.threads(), kConfig.smem_bytes()>>>(
              call);
    }
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (round > 0) samples.push_back(ms / static_cast<float>(launches));
  }
  std::sort(samples.begin(), samples.end());
  const double flops = 4.0 * kTokens * kWidth * static_cast<double>(S) * (causal ? 0.5 : 1);
  return flops / samples[samples.size() / 2] / 1e9;
}

template <int kIndex>
void report(const Buffers& b) {
  if constexpr (kIndex < kCount) {
    constexpr ForwardConfig c = kShapes[kIndex];
    cudaFuncSetAttribute(shape_kernel<kIndex>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         c.smem_bytes());
    std::printf("D %d, atoms %d, warps %d, keys %d, blocks %d, Q in registers %d:", c.head_dim,
                c.row_atoms, c.warps, c.tile_n, c.blocks_per_sm, c.q_in_registers);
    for (const bool causal : {false, true}) {
      for (const int64_t S : {512, 1024, 2048, 8192}) {
        std::printf(" %s%d %.0f", causal ? "causal " : "", static_cast<int>(S),
                    measure<kIndex>(b, S, causal));
      }
    }
    const cudaError_t error = cudaGetLastError();
    std::printf("%s\n", error == cudaSuccess ? "" : cudaGetErrorString(error));
    report<kIndex + 1>(b);
  }
}

}  // namespace

int main() { report<0>(allocate()); }
