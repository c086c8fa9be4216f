// SPDX-License-Identifier: BSD-3-Clause
// What the kernels before and behind both Hopper backward kernels share: the terms of a query row,
// and finished rows of dQ on their way to memory.
#pragma once

#include "core/softmax_row.h"
#include "cuda/fragment.cuh"
#include "cuda/hopper/backward_config.h"

namespace online_attention::cuda::hopper {

inline constexpr int kRowThreads = 256;  // of a block
inline constexpr int kVector = 8;        // elements in 16 bytes

template <typename Element>
struct alignas(16) Pack {
  Element e[kVector];
};

// Padding rows: P is 0 there, and they must not look like rows that hold Inf or NaN.
inline constexpr float kPaddingLse = 1e38f;

// A lane's part of <out, dout>.
template <typename Element>
__device__ __forceinline__ float delta_part(const BackwardArgs& args, int64_t b, int64_t h,
                                            int32_t s, int lane) {
  const auto* out = args.out.template row<const Element>(b, h, s) + lane * kVector;
  const auto* dout = args.dout.template row<const Element>(b, h, s) + lane * kVector;
  const auto x = *reinterpret_cast<const Pack<Element>*>(out);
  const auto y = *reinterpret_cast<const Pack<Element>*>(dout);
  float sum = 0;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    sum += static_cast<float>(x.e[e]) * static_cast<float>(y.e[e]);
  }
  return sum;
}

// Stores lse2 and delta of the row, whose <out, dout> is `sum`, at `place`.
template <typename Buffers>
__device__ __forceinline__ void store_terms(const BackwardArgs& args, const Buffers& buffers,
                                            int64_t head, int32_t s, int64_t place, float sum) {
  if (s >= args.shape.S_q) {
    buffers.delta[place] = 0;
    buffers.lse2[place] = kPaddingLse;
    return;
  }
  const int64_t index = head * args.shape.S_q + s;
  const float dlse = args.dlse == nullptr ? 0 : static_cast<const float*>(args.dlse)[index];
  const float lse = static_cast<const float*>(args.lse)[index];
  buffers.delta[place] = sum - dlse;  // (E28)
  buffers.lse2[place] =
      lse == -kInfinity<float> ? kInfinity<float> : SoftmaxRow<float>::from_lse(lse).m;
}

// Writes a query tile's dQ, which lies in rows of `pitch` elements.
template <typename Element>
__device__ __forceinline__ void store_dq_rows(const BackwardArgs& args, const Element* tile,
                                              int pitch, uint32_t block, int32_t q_tiles,
                                              int tile_m) {
  const int64_t head = block / q_tiles;
  const int32_t q_begin = block % q_tiles * tile_m;
  const int64_t b = head / args.shape.H, h = head % args.shape.H;
  const int chunks = static_cast<int>(args.shape.D) / kVector;
  for (int i = threadIdx.x; i < tile_m * chunks; i += kRowThreads) {
    const int row = i / chunks, column = i % chunks * kVector;
    if (q_begin + row >= args.shape.S_q) break;
    Element* target = args.dq.template row<Element>(b, h, q_begin + row) + column;
    *reinterpret_cast<uint4*>(target) =
        *reinterpret_cast<const uint4*>(tile + row * pitch + column);
  }
}

}  // namespace online_attention::cuda::hopper
