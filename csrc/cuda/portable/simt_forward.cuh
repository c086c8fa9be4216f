// SPDX-License-Identifier: BSD-3-Clause
// Forward attention in ordinary multiply-adds: fp32 and fp64 in full precision, and 16-bit types
// where the tensor-core kernel does not reach. Any D and D_v.
//
// A block of 128 threads computes 64 query rows and kColumns of the D_v output columns over a range
// of keys; larger D_v take several blocks, each with the scores computed again. Q and K stream
// through shared memory in slices of D, V in slices of keys, each loaded while the one before is
// multiplied. Probabilities go through shared memory from the score layout to the output layout.
//
// kModified: the call may have a bias or dropout. fp32 calls without, which need every register,
// have kernels of their own.
#pragma once

#include "cuda/portable/simt_forward_block.cuh"

namespace online_attention::cuda::portable {

template <typename Element, int kOutColumns, int kKeys, bool kModified>
__global__ void __launch_bounds__(128, 2) simt_forward_kernel(
    const __grid_constant__ ForwardArgs args, const __grid_constant__ TilePlan plan,
    const __grid_constant__ SplitBuffers<typename SimtTraits<Element>::Real> partial,
    bool aligned) {
  using Block = SimtBlock<Element, kOutColumns, kKeys, kModified>;
  using Real = typename Block::Real;
  using Config = typename Block::Config;
  extern __shared__ __align__(16) unsigned char smem[];
  Block block(args, plan, reinterpret_cast<Real*>(smem), aligned);
  const KvRange keys = plan.keys(args.mask, block.at);
  const int32_t query_begin = plan.query_begin(block.at.q_tile);
  const int32_t query_end = plan.query_end(block.at.q_tile);
  const auto D = static_cast<int32_t>(args.shape.D);

  // Slices alternate between two buffers: the next is on its way while one is multiplied, and the
  // barrier before each use also tells that the other buffer is free.
  int buffer = 0;
  const auto next_slice = [&] {
    ptx::cp_async_wait<0>();
    __syncthreads();
    buffer ^= 1;
    return buffer ^ 1;  // the one that has arrived
  };
  if (keys.size() > 0) block.load_qk(buffer, keys.begin, 0);
  for (int32_t kv = keys.begin; kv < keys.end; kv += Config::kTileN) {
    block.clear_scores();
    for (int32_t d = 0; d < D; d += Config::kSliceD) {
      const int here = next_slice();
      if (d + Config::kSliceD < D) {
        block.load_qk(buffer, kv, d + Config::kSliceD);
      } else {
        block.load_v(buffer, kv);
      }
      block.multiply_qk(here);  // S = Q K^T
    }
    if (args.scale.sign != 1) block.scale_scores(static_cast<Real>(args.scale.sign));
    if (block.has_bias()) block.add_bias(kv);
    const bool masked = args.mask.tile_needs_mask(query_begin, query_end, kv, kv + Config::kTileN);
    if (masked) block.hide(kv);
    block.update_softmax();  // (E6), (E7), (E8) for the sums
    if (kModified && args.dropout.exists()) block.drop(kv);
    for (int n = 0; n < Config::kTileN; n += Config::kSliceN) {
      const int here = next_slice();
      if (n + Config::kSliceN < Config::kTileN) {
        block.load_v(buffer, kv + n + Config::kSliceN);
      } else if (kv + Config::kTileN < keys.end) {
        block.load_qk(buffer, kv + Config::kTileN, 0);
      }
      const bool some_hidden = (masked && args.mask.is_banded()) || block.has_bias();
      if (some_hidden && block.has_nonfinite(here)) {
        block.template multiply_pv<true>(here, n, kv);
      } else {
        block.template multiply_pv<false>(here, n, kv);  // P V
      }
    }
    block.absorb_tile();  // (E8)
  }
  block.complete_sums();
  block.store(partial);
}

}  // namespace online_attention::cuda::portable
