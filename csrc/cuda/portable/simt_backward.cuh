// SPDX-License-Identifier: BSD-3-Clause
// What the two SIMT backward kernels share: a block works on tiles of kTileM queries and kTileN
// keys, one after the other. For each:
//
//   S = Q K^T         columns of both stream through shared memory in slices
//   P                 (E25), to shared memory
//   dP = dO V^T       (E27), as S
//   dS                (E29), over P in shared memory
//
// and between and behind these the products with P and dS, whose other factor streams in slices of
// rows. Each slice is loaded while the one before is multiplied. Any D and D_v: a block adds up
// kColumns columns of the gradients, and larger head dims take several blocks, each with the scores
// computed again. kAligned: rows of all inputs are readable in 16-byte pieces.
//
// kModified: the call may have a bias or dropout. The bias is added to S; P of a pair that dropout
// drops changes its sign, since dV takes it as 0 and dS takes its value.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/portable/simt_backward.h"
#include "cuda/portable/simt_backward_tile.cuh"
#include "cuda/portable/simt_pairs.cuh"

namespace online_attention::cuda::portable {

// One thread's part of a block, and the slices it works from.
template <typename Element, int kColumnsOfBlock, bool kAligned, bool kModified>
struct SimtBackwardBlock {
  using Real = typename SimtTraits<Element>::Real;
  using Config = SimtBackwardConfig<Real, kColumnsOfBlock>;
  using Scores = Real[Config::kRows][Config::kScores];
  static constexpr int kVector = Config::kVector;

  using ScoresPlace = GridPlace<Config::kScoresY, Config::kScoresX>;

  const BackwardArgs& args;
  const Real* delta;
  Real* slices;  // two of kSliceElements
  Real* tile;    // [kTileM][kPitchP], P and then dS
  int32_t b, h, kv_head;
  int32_t first_column;
  Real keep_scale;  // of dropout; used if kModified
  bool reads_delta = true;
  int32_t q = 0, kv = 0;  // first query and key of the current tile
  int buffer = 0;         // the slice that is filled next

  __device__ __forceinline__ SimtBackwardBlock(const BackwardArgs& args, const Real* delta,
                                               Real keep_scale, void* smem)
      : args(args),
        delta(delta),
        slices(static_cast<Real*>(smem)),
        tile(slices + 2 * Config::kSliceElements),
        keep_scale(keep_scale) {}

  __device__ __forceinline__ RowSource<Element> rows_of(const View& view, int32_t head,
                                                        int64_t rows, int64_t length) const {
    return {view.row<const Element>(b, head, 0), view.stride_s, 0, 1, static_cast<int32_t>(rows),
            static_cast<int32_t>(length),        kAligned};
  }
  __device__ __forceinline__ RowSource<Element> q_rows() const {
    return rows_of(args.q, h, args.shape.S_q, args.shape.D);
  }
  __device__ __forceinline__ RowSource<Element> dout_rows() const {
    return rows_of(args.dout, h, args.shape.S_q, args.shape.D_v);
  }
  __device__ __forceinline__ RowSource<Element> k_rows() const {
    return rows_of(args.k, kv_head, args.shape.S_kv, args.shape.D);
  }
  __device__ __forceinline__ RowSource<Element> v_rows() const {
    return rows_of(args.v, kv_head, args.shape.S_kv, args.shape.D_v);
  }

  template <int kRows, int kWidth, int kPitch>
  __device__ __forceinline__ void load(Real* target, const RowSource<Element>& from, int32_t first,
                                       int32_t column) const {
    if constexpr (kAligned) {
      load_aligned<Config, kRows, kWidth, kPitch>(target, from, first, column);
    } else {
      load_slice<Config, kRows, kWidth, kPitch>(target, from, first, column);
    }
  }
  // Columns [d, d + kSliceD) of the tile's queries, and of its keys behind them.
  __device__ __forceinline__ void load_pair(const RowSource<Element>& of_queries,
                                            const RowSource<Element>& of_keys, int32_t d) const {
    Real* slice = slices + buffer * Config::kSliceElements;
    load<Config::kTileM, Config::kSliceD, Config::kPitchD>(slice, of_queries, q, d);
    load<Config::kTileN, Config::kSliceD, Config::kPitchD>(slice + Config::kTileM * Config::kPitchD,
                                                           of_keys, kv, d);
    ptx::cp_async_commit();
  }
  // The lse and delta of the tile's rows, into the tile. Nobody may need those of the tile before.
  __device__ __forceinline__ void load_row_numbers() const {
    const auto s_q = static_cast<int32_t>(args.shape.S_q);
    const auto row = static_cast<int32_t>(ptx::thread_index());
    if (row >= Config::kTileM) return;
    const int64_t source = (int64_t{b} * args.shape.H + h) * s_q + q + row;
    const bool exists = q + row < s_q;
    const uint32_t target = ptx::shared_address(tile + row * Config::kPitchP);
    ptx::cp_async<sizeof(Real)>(target + Config::kLseColumn * sizeof(Real),
                                static_cast<const Real*>(args.lse) + source, exists);
    ptx::cp_async<sizeof(Real)>(target + Config::kDeltaColumn * sizeof(Real), delta + source,
                                exists && reads_delta);
  }
  // What the scores of a tile begin with.
  __device__ __forceinline__ void load_tile() const {
    load_row_numbers();
    load_qk(0);
  }
  __device__ __forceinline__ void load_qk(int32_t d) const { load_pair(q_rows(), k_rows(), d); }
  __device__ __forceinline__ void load_dout_v(int32_t d) const {
    load_pair(dout_rows(), v_rows(), d);
  }
  // The block's columns of kSliceRows rows from `first` on.
  __device__ __forceinline__ void load_rows(const RowSource<Element>& from, int32_t first) const {
    load<Config::kSliceRows, Config::kColumns, Config::kColumns>(
        slices + buffer * Config::kSliceElements, from, first, first_column);
    ptx::cp_async_commit();
  }

  // Waits for the slice on its way and returns it. The other buffer is free from here on.
  __device__ __forceinline__ const Real* arrived() {
    ptx::cp_async_wait<0>();
    __syncthreads();
    const Real* slice = slices + buffer * Config::kSliceElements;
    buffer ^= 1;
    return slice;
  }

  // sum = A B^T over `length` columns, of which load(0) is on its way; load_following() starts
  // what comes behind.
  template <typename Load, typename LoadFollowing>
  __device__ __forceinline__ void score(Scores& sum, int64_t length, const Load& load,
                                        const LoadFollowing& load_following) {
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kScores; ++j) sum[i][j] = 0;
    }
    for (int32_t d = 0; d < length; d += Config::kSliceD) {
      const Real* slice = arrived();
      if (d + Config::kSliceD < length) {
        load(d + Config::kSliceD);
      } else {
        load_following();
      }
      const ScoresPlace at;
      multiply_rows<Config>(sum, slice + at.y * Config::kPitchD,
                            slice + (Config::kTileM + at.x) * Config::kPitchD);
    }
  }

  __device__ __forceinline__ int32_t query(const ScoresPlace& at, int i) const {
    return q + at.y + Config::kScoresY * i;
  }
  // This thread's first element of row i of the tile; the next are kScoresX apart.
  __device__ __forceinline__ Real* tile_row(const ScoresPlace& at, int i) const {
    return tile + (at.y + Config::kScoresY * i) * Config::kPitchP + at.x;
  }
  __device__ __forceinline__ bool has_bias() const { return kModified && args.bias.exists(); }
  // Whether some pair of the tile is hidden or has no query.
  __device__ __forceinline__ bool is_masked() const {
    const int32_t q_end = q + Config::kTileM;
    return q_end > args.shape.S_q || args.mask.tile_needs_mask(q, q_end, kv, kv + Config::kTileN);
  }

  // Whether a weight of 0 may stand for a pair that is hidden, in a tile that is_masked or not.
  __device__ __forceinline__ bool hides_some(bool masked) const {
    return (masked && args.mask.is_banded()) || has_bias();
  }

  // P from the scores (E25), into the tile.
  __device__ __forceinline__ void weigh(Scores& scores) const {
    const ScoresPlace at;
    const Real scale = static_cast<Real>(args.scale.sign * args.scale.log2);
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      Real* p = tile_row(at, i);
      RowOfLse<Real> row(p[Config::kLseColumn - at.x], scale);
      row.round_alike(scores[i]);
#pragma unroll
      for (int j = 0; j < Config::kScores; ++j) {
        p[Config::kScoresX * j] = row.weight(scores[i][j]);
      }
    }
  }

  // As weigh, for scores with a bias; P is exactly 0 where it hides. It is read into the places of
  // the thread's own P first, a row at a time: there are no registers for the addresses of all.
  __device__ __forceinline__ void weigh_biased(const Scores& scores) const {
    const ScoresPlace at;
    with_bias_type<Element>(args.bias, [&](auto element) {
      const auto last = static_cast<int32_t>(args.shape.S_q) - 1;
#pragma unroll 1
      for (int i = 0; i < Config::kRows; ++i) {
        const auto* row = args.bias.row<decltype(element)>(anew(b), h, min(query(at, i), last));
        fetch_bias<Config::kScoresX, Config::kScores>(tile_row(at, i), row, args.bias.stride_kv,
                                                      kv + at.x,
                                                      static_cast<int32_t>(args.shape.S_kv));
      }
    });
    const Real scale = static_cast<Real>(args.scale.sign * args.scale.log2);
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      Real* p = tile_row(at, i);
      const RowOfLse<Real> row(p[Config::kLseColumn - at.x], scale);
#pragma unroll
      for (int j = 0; j < Config::kScores; ++j) {
        Real& pair = p[Config::kScoresX * j];
        pair = row.weight(scores[i][j], pair);
      }
    }
  }

  // Sets P to exactly 0 where hidden and where there is no row.
  __device__ __forceinline__ void hide() const {
    const ScoresPlace at;
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      const int32_t q_idx = query(at, i);
      Real* p = tile_row(at, i);
      KvRange seen = {0, 0};
      if (q_idx < args.shape.S_q) seen = args.mask.kv_range(q_idx, q_idx + 1);
#pragma unroll
      for (int j = 0; j < Config::kScores; ++j) {
        const int32_t kv_idx = kv + at.x + Config::kScoresX * j;
        if (kv_idx < seen.begin || kv_idx >= seen.end) p[Config::kScoresX * j] = 0;
      }
    }
  }

  // P of dropped pairs becomes -P. This thread's own.
  __device__ __forceinline__ void drop() const {
    const ScoresPlace at;
#pragma unroll 1
    for (int i = 0; i < Config::kRows; ++i) {
      Real* p = tile_row(at, i);
      for_dropped<Config::kScoresX, Config::kScores>(
          args.dropout, anew(b) * args.shape.H + h, query(at, i), kv, at.x,
          [&](int j) { p[Config::kScoresX * j] = -p[Config::kScoresX * j]; });
    }
  }

  // dS from dP and the tile's P (E29), over P. 0 where P is, whatever dP and delta are.
  __device__ __forceinline__ void differentiate(const Scores& dp) const {
    const ScoresPlace at;
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      Real* row = tile_row(at, i);
      const Real row_delta = row[Config::kDeltaColumn - at.x];
#pragma unroll
      for (int j = 0; j < Config::kScores; ++j) {
        Real p = row[Config::kScoresX * j], kept_dp = dp[i][j];
        if constexpr (kModified) {
          kept_dp = p < 0 ? Real(0) : kept_dp * keep_scale;
          p = fabs(p);
        }
        row[Config::kScoresX * j] = p == 0 ? Real(0) : p * (kept_dp - row_delta);
      }
    }
  }

  // Whether the slice of rows holds Inf or NaN. All threads.
  __device__ __forceinline__ bool has_nonfinite(const Real* slice) const {
    bool found = false;
    for (int i = threadIdx.x; i < Config::kRowsElements; i += Config::kThreads) {
      found |= !isfinite(slice[i]);
    }
    return __syncthreads_or(found) != 0;
  }

  // Column of register c of a row of vectors, kAcross of them side by side, at place x.
  template <int kAcross>
  __device__ __forceinline__ int32_t column(int x, int c) const {
    return first_column + (c / kVector * kAcross + x) * kVector + c % kVector;
  }
};

}  // namespace online_attention::cuda::portable
