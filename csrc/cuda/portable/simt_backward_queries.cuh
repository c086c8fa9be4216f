// SPDX-License-Identifier: BSD-3-Clause
// dQ in ordinary multiply-adds, with no addition across blocks: the same bits in every run. A block
// owns kTileM queries of one head and walks over the keys they see.
#pragma once

#include "cuda/portable/simt_backward.cuh"

namespace online_attention::cuda::portable {

template <typename Element, int kColumnsOfBlock, bool kAligned, bool kModified>
__global__ void __launch_bounds__(128, 2)
    simt_backward_queries_kernel(const __grid_constant__ BackwardArgs args,
                                 const __grid_constant__ BackwardPlan plan,
                                 const typename SimtTraits<Element>::Real* delta,
                                 typename SimtTraits<Element>::Real factor,
                                 typename SimtTraits<Element>::Real keep_scale) {
  using Block = SimtBackwardBlock<Element, kColumnsOfBlock, kAligned, kModified>;
  using Real = typename Block::Real;
  using Config = typename Block::Config;
  extern __shared__ __align__(16) unsigned char smem[];
  const Shape& shape = args.shape;

  Block block(args, delta, keep_scale, smem);
  uint32_t index = blockIdx.x;
  block.first_column = static_cast<int32_t>(index % plan.column_blocks) * Config::kColumns;
  index /= plan.column_blocks;
  // Under a causal mask the last tiles see the most keys: they come first.
  block.q = static_cast<int32_t>(plan.q_tiles - 1 - index % plan.q_tiles) * Config::kTileM;
  index /= plan.q_tiles;
  block.b = static_cast<int32_t>(index / static_cast<uint32_t>(shape.H));
  block.h = static_cast<int32_t>(index % static_cast<uint32_t>(shape.H));
  block.kv_head = block.h / static_cast<int32_t>(shape.group());
  if (block.first_column >= shape.D) return;

  const auto s_q = static_cast<int32_t>(shape.S_q);
  const int32_t q_end = block.q + Config::kTileM < s_q ? block.q + Config::kTileM : s_q;
  const KvRange keys = args.mask.kv_range(block.q, q_end);
  const auto load_qk = [&](int32_t d) { block.load_qk(d); };
  const auto load_dout_v = [&](int32_t d) { block.load_dout_v(d); };

  Real dq[Config::kRows][Config::kQueryOuts] = {};
  block.kv = keys.begin;
  if (kModified) block.kv -= block.kv % Config::kTileN;  // drop() takes whole groups of keys
  if (keys.size() > 0) block.load_tile();
  while (block.kv < keys.end) {
    const bool masked = block.is_masked();
    typename Block::Scores scores;
    block.score(scores, shape.D, load_qk, [&] { load_dout_v(0); });  // S = Q K^T
    if (block.has_bias()) {
      block.weigh_biased(scores);  // (E25)
    } else {
      block.weigh(scores);
    }
    if (masked) block.hide();
    if (kModified && args.dropout.exists()) block.drop();
    block.score(scores, shape.D_v, load_dout_v,  // (E27)
                [&] { block.load_rows(block.k_rows(), block.kv); });
    block.differentiate(scores);  // (E29)

    Real sum[Config::kRows][Config::kQueryOuts] = {};  // dS K of this key tile
    const int32_t kv = block.kv;
    for (int n = 0; n < Config::kTileN; n += Config::kSliceRows) {
      const Real* slice = block.arrived();
      if (n + Config::kSliceRows < Config::kTileN) {
        block.load_rows(block.k_rows(), kv + n + Config::kSliceRows);
      } else {
        block.kv += Config::kTileN;
        if (block.kv < keys.end) block.load_tile();
      }
      const typename Block::ScoresPlace at;
      const Real* weights = block.tile + at.y * Config::kPitchP + n;
      const Real* values = slice + at.x * Config::kVector;
      if (block.hides_some(masked) && block.has_nonfinite(slice)) {
        multiply_plain<Config, true>(sum, weights, values);
      } else {
        multiply_plain<Config, false>(sum, weights, values);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
#pragma unroll
      for (int c = 0; c < Config::kQueryOuts; ++c) dq[i][c] += sum[i][c];
    }
  }

  const typename Block::ScoresPlace at;
#pragma unroll
  for (int i = 0; i < Config::kRows; ++i) {
    const int32_t q_idx = block.query(at, i);
    if (q_idx >= s_q) break;
    Element* row = args.dq.row<Element>(block.b, block.h, q_idx);
#pragma unroll
    for (int c = 0; c < Config::kQueryOuts; ++c) {
      const int32_t column = block.template column<Config::kScoresX>(at.x, c);
      if (column < shape.D) row[column] = static_cast<Element>(factor * dq[i][c]);  // (E30)
    }
  }
}

}  // namespace online_attention::cuda::portable
