// SPDX-License-Identifier: BSD-3-Clause
// dK and dV in ordinary multiply-adds, and dQ with atomic additions. A block owns kTileN keys of
// one kv head and walks over the queries that see them, of all heads of the group.
#pragma once

#include <type_traits>

#include "cuda/portable/simt_backward.cuh"
#include "cuda/ptx/global.cuh"

namespace online_attention::cuda::portable {

template <typename Element, int kColumnsOfBlock, bool kAligned, bool kModified>
struct SimtBackwardKeys : SimtBackwardBlock<Element, kColumnsOfBlock, kAligned, kModified> {
  using Base = SimtBackwardBlock<Element, kColumnsOfBlock, kAligned, kModified>;
  using typename Base::Config;
  using typename Base::Real;
  using Gradient = Real[Config::kKeys][Config::kKeyOuts];
  using KeysPlace = GridPlace<Config::kKeysY, Config::kKeysX>;
  using Base::args, Base::q, Base::kv;
  using typename Base::ScoresPlace;

  Gradient dk = {}, dv = {};

  using Base::Base;

  // gradient += W^T X with the tile's weights W, where X are rows of Q or dO from the tile's first
  // query on. The tile has a sum of its own: two short sums round less than one long one. kDrops:
  // weights below 0 count as 0.
  template <bool kDrops, typename LoadFollowing>
  __device__ __forceinline__ void add_transposed(Gradient& gradient, const RowSource<Element>& from,
                                                 bool masked, const LoadFollowing& load_following) {
    Gradient sum = {};
    for (int m = 0; m < Config::kTileM; m += Config::kSliceRows) {
      const Real* slice = this->arrived();
      if (m + Config::kSliceRows < Config::kTileM) {
        this->load_rows(from, q + m + Config::kSliceRows);
      } else {
        load_following();
      }
      const KeysPlace at;
      const Real* weights = this->tile + m * Config::kPitchP + at.y * Config::kVector;
      const Real* values = slice + at.x * Config::kVector;
      if (this->hides_some(masked) && this->has_nonfinite(slice)) {
        multiply_transposed<Config, true, kDrops>(sum, weights, values);
      } else {
        multiply_transposed<Config, false, kDrops>(sum, weights, values);
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kKeys; ++n) {
#pragma unroll
      for (int c = 0; c < Config::kKeyOuts; ++c) gradient[n][c] += sum[n][c];
    }
  }

  // (E30) for the tile: dq += c dS K.
  template <typename LoadFollowing>
  __device__ __forceinline__ void add_dq(bool masked, Real factor, bool vectorised,
                                         const LoadFollowing& load_following) {
    Real sum[Config::kRows][Config::kQueryOuts] = {};
    for (int n = 0; n < Config::kTileN; n += Config::kSliceRows) {
      const Real* slice = this->arrived();
      if (n + Config::kSliceRows < Config::kTileN) {
        this->load_rows(this->k_rows(), kv + n + Config::kSliceRows);
      } else {
        load_following();
      }
      const ScoresPlace at;
      const Real* weights = this->tile + at.y * Config::kPitchP + n;
      const Real* values = slice + at.x * Config::kVector;
      if (this->hides_some(masked) && this->has_nonfinite(slice)) {
        multiply_plain<Config, true>(sum, weights, values);
      } else {
        multiply_plain<Config, false, kModified ? kUnrollDq : kUnroll>(sum, weights, values);
      }
    }
    // The plan gives other types than fp32 a kernel for dQ.
    if constexpr (sizeof(Real) == sizeof(float)) add_to_dq(sum, factor, vectorised);
  }
  __device__ __forceinline__ void add_to_dq(const float (&sum)[Config::kRows][Config::kQueryOuts],
                                            float factor, bool vectorised) const {
    const ScoresPlace at;
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      const int32_t q_idx = this->query(at, i);
      if (q_idx >= args.shape.S_q) break;
      float* row = args.dq.template row<float>(this->b, this->h, q_idx);
#pragma unroll
      for (int c = 0; c < Config::kQueryOuts; c += 4) {
        const int32_t column = this->template column<Config::kScoresX>(at.x, c);
        const float added[4] = {factor * sum[i][c], factor * sum[i][c + 1], factor * sum[i][c + 2],
                                factor * sum[i][c + 3]};
        if (vectorised) {
          if (column < args.shape.D) ptx::reduce_add(row + column, added);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (column + e < args.shape.D) atomicAdd(row + column + e, added[e]);
          }
        }
      }
    }
  }

  // Row n of the registers is this key; Target rows are found by row_of(key).
  template <typename RowOf>
  __device__ __forceinline__ void store(const Gradient& gradient, int64_t columns, Real factor,
                                        const RowOf& row_of) const {
    const KeysPlace at;
#pragma unroll
    for (int n = 0; n < Config::kKeys; ++n) {
      const int32_t key = kv + (n / Config::kVector * Config::kKeysY + at.y) * Config::kVector +
                          n % Config::kVector;
      if (key >= args.shape.S_kv) continue;
      auto* row = row_of(key);
      using Target = std::remove_pointer_t<decltype(row)>;
#pragma unroll
      for (int c = 0; c < Config::kKeyOuts; ++c) {
        const int32_t column = this->template column<Config::kKeysX>(at.x, c);
        if (column < columns) row[column] = static_cast<Target>(gradient[n][c] * factor);
      }
    }
  }
};

// Which tiles of queries a block walks over: heads of the group in order, in each the tiles from
// the first query that sees a key of the block on. (Counts of tiles that exist fit 32 bits: their
// rows have an lse each.)
struct QueryWalk {
  QRange queries;
  int32_t tiles;  // that are left
  int32_t h, q;   // head and first query of the current tile

  __device__ __forceinline__ QueryWalk(QRange queries, int32_t tile_m, int32_t first_head,
                                       int32_t group, uint32_t part, uint32_t parts)
      : queries(queries) {
    const int32_t per_head = ceil_div(queries.size(), tile_m), all = per_head * group;
    const auto begin = static_cast<int32_t>(int64_t{all} * part / parts);
    tiles = static_cast<int32_t>(int64_t{all} * (part + 1) / parts) - begin;
    h = first_head + (tiles > 0 ? begin / per_head : 0);
    q = queries.begin + (tiles > 0 ? begin % per_head : 0) * tile_m;
  }
  __device__ __forceinline__ QueryWalk next(int32_t tile_m) const {
    QueryWalk after = *this;
    --after.tiles;
    after.q += tile_m;
    if (after.q >= queries.end) {
      after.q = queries.begin;
      ++after.h;
    }
    return after;
  }
};

template <typename Element, int kColumnsOfBlock, bool kAligned, bool kModified>
__global__ void __launch_bounds__(128, 2) simt_backward_keys_kernel(
    const __grid_constant__ BackwardArgs args, const __grid_constant__ BackwardPlan plan,
    const __grid_constant__ BackwardBuffers<typename SimtTraits<Element>::Real> buffers,
    typename SimtTraits<Element>::Real factor, bool dq_aligned,
    typename SimtTraits<Element>::Real keep_scale) {
  using Block = SimtBackwardKeys<Element, kColumnsOfBlock, kAligned, kModified>;
  using Real = typename Block::Real;
  using Config = typename Block::Config;
  extern __shared__ __align__(16) unsigned char smem[];
  const Shape& shape = args.shape;
  const auto group = static_cast<int32_t>(shape.group());

  Block block(args, buffers.delta, keep_scale, smem);
  uint32_t index = blockIdx.x;
  block.first_column = static_cast<int32_t>(index % plan.column_blocks) * Config::kColumns;
  index /= plan.column_blocks;
  const uint32_t part = index % plan.parts;
  index /= plan.parts;
  block.kv = static_cast<int32_t>(index % plan.key_tiles) * Config::kTileN;
  index /= plan.key_tiles;
  block.b = static_cast<int32_t>(index / static_cast<uint32_t>(shape.H_kv));
  block.kv_head = static_cast<int32_t>(index % static_cast<uint32_t>(shape.H_kv));

  const bool adds_dv = args.dv.data != nullptr && block.first_column < shape.D_v;
  const bool adds_dk = args.dk.data != nullptr && block.first_column < shape.D;
  const bool adds_dq =
      args.dq.data != nullptr && !plan.queries_apart && block.first_column < shape.D;
  const bool needs_ds = adds_dk || adds_dq;
  if (!adds_dv && !needs_ds) return;

  QueryWalk walk(
      args.mask.q_range(block.kv, block.kv + Config::kTileN, static_cast<int32_t>(shape.S_q)),
      Config::kTileM, block.kv_head * group, group, part, plan.parts);
  block.reads_delta = needs_ds;  // else it was not computed
  const auto load_tile = [&](const QueryWalk& of) {
    block.h = of.h, block.q = of.q;
    block.load_tile();
    block.h = walk.h, block.q = walk.q;
  };
  const auto load_qk = [&](int32_t d) { block.load_qk(d); };
  const auto load_dout_v = [&](int32_t d) { block.load_dout_v(d); };
  const auto load_next_tile = [&] {
    if (walk.tiles > 1) load_tile(walk.next(Config::kTileM));
  };

  if (walk.tiles > 0) load_tile(walk);
  for (; walk.tiles > 0; walk = walk.next(Config::kTileM)) {
    block.h = walk.h, block.q = walk.q;
    const bool masked = block.is_masked();
    typename Block::Scores scores;
    block.score(scores, shape.D, load_qk, [&] {  // S = Q K^T
      if (adds_dv) {
        block.load_rows(block.dout_rows(), block.q);
      } else {
        load_dout_v(0);
      }
    });
    if (block.has_bias()) {
      block.weigh_biased(scores);  // (E25)
    } else {
      block.weigh(scores);
    }
    if (masked) block.hide();
    if (kModified && args.dropout.exists()) block.drop();
    if (adds_dv) {
      block.template add_transposed<kModified>(block.dv, block.dout_rows(), masked, [&] {  // (E26)
        if (needs_ds) {
          load_dout_v(0);
        } else {
          load_next_tile();
        }
      });
    }
    if (needs_ds) {
      block.score(scores, shape.D_v, load_dout_v, [&] {  // (E27)
        if (adds_dk) {
          block.load_rows(block.q_rows(), block.q);
        } else {
          block.load_rows(block.k_rows(), block.kv);
        }
      });
      block.differentiate(scores);  // (E29)
    }
    if (adds_dk) {
      block.template add_transposed<false>(block.dk, block.q_rows(), masked, [&] {  // (E31)
        if (adds_dq) {
          block.load_rows(block.k_rows(), block.kv);
        } else {
          load_next_tile();
        }
      });
    }
    if (adds_dq) block.add_dq(masked, factor, dq_aligned, load_next_tile);  // (E30)
  }

  const int64_t b = block.b, kv_head = block.kv_head;
  if (plan.parts > 1) {
    const int64_t head = b * shape.H_kv + kv_head;
    const int64_t first_row = (part * shape.B * shape.H_kv + head) * shape.S_kv;
    if (adds_dk) {
      block.store(block.dk, shape.D, Real(1),
                  [&](int32_t key) { return buffers.dk + (first_row + key) * shape.D; });
    }
    if (adds_dv) {
      block.store(block.dv, shape.D_v, Real(1),
                  [&](int32_t key) { return buffers.dv + (first_row + key) * shape.D_v; });
    }
    return;
  }
  if (adds_dk) {
    block.store(block.dk, shape.D, factor,
                [&](int32_t key) { return args.dk.row<Element>(b, kv_head, key); });
  }
  if (adds_dv) {
    block.store(block.dv, shape.D_v, kModified ? keep_scale : Real(1),
                [&](int32_t key) { return args.dv.row<Element>(b, kv_head, key); });
  }
}

}  // namespace online_attention::cuda::portable
