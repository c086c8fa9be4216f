// SPDX-License-Identifier: BSD-3-Clause
// Forward attention in ordinary multiply-adds: fp32 and fp64 in full precision, and 16-bit types
// where the tensor-core kernel does not reach. Any D and D_v.
//
// A block of 128 threads computes 64 query rows and kColumns of the D_v output columns over a range
// of keys; larger D_v take several blocks, each with the scores computed again. Threads form an
// 8 x 16 grid: thread (ty, tx) holds rows ty + 8i, score columns tx + 16j, and output columns in
// groups of kVector at tx * kVector + 16 * kVector * j. Q and K stream through shared memory in
// slices of D, V in slices of keys, each loaded while the one before is multiplied. Probabilities
// go through shared memory from the score layout to the output layout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/softmax_row.h"
#include "cuda/arithmetic.cuh"
#include "cuda/portable/simt_slice.cuh"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::portable {

// One thread's part of the block, and the slices it works from.
template <typename Element, int kOutColumns, int kKeys>
struct SimtBlock {
  using Real = typename SimtTraits<Element>::Real;
  using Config = SimtConfig<Real, kOutColumns, kKeys>;
  static constexpr int kRows = Config::kRows, kScores = Config::kScores, kOuts = Config::kOuts;
  static constexpr int kVector = Config::kVector;

  const ForwardArgs& args;
  const TilePlan& plan;
  TileCoord at;
  Real* slices;         // two of kSliceElements
  Real* probabilities;  // [kTileM][kPitchP]
  RowSource<Element> q, k, v;
  int tx, ty;

  Real scores[kRows][kScores];
  Real out[kRows][kOuts] = {};
  Real tile_out[kRows][kOuts];  // P V of the current key tile, if kSumsTiles
  Real alpha[kRows];
  SoftmaxRow<Real> softmax[kRows];

  __device__ __forceinline__ SimtBlock(const ForwardArgs& args, const TilePlan& plan, Real* smem,
                                       bool aligned)
      : args(args),
        plan(plan),
        at(plan.locate(blockIdx.x)),
        slices(smem),
        probabilities(smem + 2 * Config::kSliceElements),
        tx(threadIdx.x % Config::kThreadsX),
        ty(threadIdx.x / Config::kThreadsX) {
    const int32_t h_kv = at.h / plan.group;
    q = rows_of(args.q, at.h, plan.pack, plan.rows, args.shape.D, aligned);
    k = rows_of(args.k, h_kv, 1, args.shape.S_kv, args.shape.D, aligned);
    v = rows_of(args.v, h_kv, 1, args.shape.S_kv, args.shape.D_v, aligned);
  }

  __device__ __forceinline__ RowSource<Element> rows_of(const View& view, int64_t h, int32_t pack,
                                                        int64_t rows, int64_t length,
                                                        bool aligned) const {
    return {view.row<const Element>(at.b, h, 0),
            view.stride_s,
            view.stride_h,
            pack,
            static_cast<int32_t>(rows),
            static_cast<int32_t>(length),
            aligned};
  }
  __device__ __forceinline__ int32_t packed_row(int i) const {
    return at.q_tile * Config::kTileM + ty + Config::kThreadsY * i;
  }
  __device__ __forceinline__ int32_t query(int i) const { return plan.query_of(packed_row(i)); }
  __device__ __forceinline__ int32_t first_column() const {
    return at.column_block * Config::kColumns;
  }

  // Columns [d, d + kSliceD) of the block's queries, and of the keys from `kv` on behind them.
  __device__ __forceinline__ void load_qk(int buffer, int32_t kv, int32_t d) const {
    Real* slice = slices + buffer * Config::kSliceElements;
    load_slice<Config, Config::kTileM, Config::kSliceD, Config::kPitchD>(
        slice, q, at.q_tile * Config::kTileM, d);
    load_slice<Config, Config::kTileN, Config::kSliceD, Config::kPitchD>(
        slice + Config::kTileM * Config::kPitchD, k, kv, d);
    ptx::cp_async_commit();
  }
  // The block's columns of kSliceN values from key `kv` on.
  __device__ __forceinline__ void load_v(int buffer, int32_t kv) const {
    load_slice<Config, Config::kSliceN, Config::kColumns, Config::kColumns>(
        slices + buffer * Config::kSliceElements, v, kv, first_column());
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void clear_scores() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kScores; ++j) scores[i][j] = 0;
    }
  }

  // scores += Q K^T over one slice of D
  __device__ __forceinline__ void multiply_qk(int buffer) {
    if constexpr (Config::kSumsSlices) {
      Real slice_sum[kRows][kScores] = {};
      accumulate_qk(buffer, slice_sum);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kScores; ++j) scores[i][j] += slice_sum[i][j];
      }
    } else {
      accumulate_qk(buffer, scores);
    }
  }
  __device__ __forceinline__ void accumulate_qk(int buffer, Real (&sum)[kRows][kScores]) const {
    const Real* q_slice = slices + buffer * Config::kSliceElements + ty * Config::kPitchD;
    const Real* k_slice =
        slices + buffer * Config::kSliceElements + (Config::kTileM + tx) * Config::kPitchD;
#pragma unroll 1
    for (int d = 0; d < Config::kSliceD; d += kVector) {
      Vector<Real> q_part[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        q_part[i] = vector_at(q_slice + i * Config::kThreadsY * Config::kPitchD + d);
      }
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        const auto k_part = vector_at(k_slice + j * Config::kThreadsX * Config::kPitchD + d);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) sum[i][j] += q_part[i].e[e] * k_part.e[e];
        }
      }
    }
  }

  __device__ __forceinline__ void scale_scores(Real sign) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kScores; ++j) scores[i][j] *= sign;
    }
  }

  // Hides what the mask hides: those scores become -inf, whatever they were.
  __device__ __forceinline__ void hide(int32_t kv) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t q_idx = query(i);
      const KvRange seen = args.mask.kv_range(q_idx, q_idx + 1);
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        const int32_t kv_idx = kv + tx + Config::kThreadsX * j;
        if (kv_idx < seen.begin || kv_idx >= seen.end) scores[i][j] = -kInfinity<Real>;
      }
    }
  }

  // (E6), (E7), and (E8) for the sums; the probabilities move to shared memory. A row's sum stays
  // spread over the 16 threads that share the row.
  __device__ __forceinline__ void update_softmax() {
    const Real scale_log2 = static_cast<Real>(args.scale.log2);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Real tile_max = -kInfinity<Real>;
#pragma unroll
      for (int j = 0; j < kScores; ++j) tile_max = max_of(tile_max, scores[i][j]);
#pragma unroll
      for (int lane = 1; lane < Config::kThreadsX; lane *= 2) {
        tile_max = max_of(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, lane));
      }
      alpha[i] = softmax[i].raise(tile_max * scale_log2);
      Real factor = scale_log2;
      if (fabs(softmax[i].base()) > kFusedUpTo<Real>) {
        factor = 1;
#pragma unroll
        for (int j = 0; j < kScores; ++j) {
          scores[i][j] = rounded_product(scores[i][j], scale_log2);
        }
      }
      Real tile_sum = 0;
      Real* p_row = probabilities + (ty + Config::kThreadsY * i) * Config::kPitchP + tx;
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        const Real p = softmax[i].weight(scores[i][j] * factor);
        p_row[Config::kThreadsX * j] = p;
        tile_sum += p;
      }
      softmax[i].absorb(alpha[i], tile_sum);
#pragma unroll
      for (int j = 0; j < kOuts; ++j) {
        if constexpr (Config::kSumsTiles) {
          tile_out[i][j] = 0;
        } else {
          out[i][j] *= alpha[i];
        }
      }
    }
  }

  // P V over one slice of keys, added to the outputs or the tile's; `slice_begin` counts from the
  // tile's first key. With kExact, hidden pairs are left out one by one: for V with Inf or NaN,
  // where 0 * V is not 0.
  template <bool kExact>
  __device__ __forceinline__ void multiply_pv(int buffer, int slice_begin, int32_t kv) {
    Real(&sum)[kRows][kOuts] = Config::kSumsTiles ? tile_out : out;
    const Real* p_slice = probabilities + ty * Config::kPitchP + slice_begin;
    const Real* v_slice = slices + buffer * Config::kSliceElements + tx * kVector;
#pragma unroll 1
    for (int n = 0; n < Config::kSliceN; n += kVector) {
      Vector<Real> p[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        p[i] = *reinterpret_cast<const Vector<Real>*>(p_slice +
                                                      i * Config::kThreadsY * Config::kPitchP + n);
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
#pragma unroll
        for (int j = 0; j < kOuts; j += kVector) {
          const auto values =
              vector_at(v_slice + (n + e) * Config::kColumns + j * Config::kThreadsX);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if (kExact && !args.mask.visible(query(i), kv + slice_begin + n + e)) continue;
#pragma unroll
            for (int x = 0; x < kVector; ++x) sum[i][j + x] += p[i].e[e] * values.e[x];
          }
        }
      }
    }
  }

  // (E8) for the outputs, O := alpha O + P V, where the tile has a sum of its own.
  __device__ __forceinline__ void absorb_tile() {
    if constexpr (Config::kSumsTiles) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kOuts; ++j) out[i][j] = out[i][j] * alpha[i] + tile_out[i][j];
      }
    }
  }

  // Whether the V slice holds Inf or NaN. All threads.
  __device__ __forceinline__ bool has_nonfinite(int buffer) const {
    const Real* v_slice = slices + buffer * Config::kSliceElements;
    bool found = false;
    for (int i = threadIdx.x; i < Config::kSliceN * Config::kColumns; i += Config::kThreads) {
      found |= !isfinite(v_slice[i]);
    }
    return __syncthreads_or(found) != 0;
  }

  // Adds up the parts of the row sums that the threads of a row hold.
  __device__ __forceinline__ void complete_sums() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int lane = 1; lane < Config::kThreadsX; lane *= 2) {
        softmax[i].l += __shfl_xor_sync(0xffffffffu, softmax[i].l, lane);
      }
    }
  }

  // Column of output register j among the D_v.
  __device__ __forceinline__ int64_t out_column(int j) const {
    return first_column() + j / kVector * kVector * Config::kThreadsX + tx * kVector + j % kVector;
  }

  __device__ __forceinline__ void store(const SplitBuffers<Real>& partial) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t row = packed_row(i);
      if (row >= plan.rows) continue;
      const int32_t q_idx = plan.query_of(row);
      const int32_t h = at.h + row - q_idx * plan.pack;
      const int64_t lse_row = (int64_t{at.b} * args.shape.H + h) * args.shape.S_q + q_idx;
      const bool writes_lse = tx == 0 && at.column_block == 0;
      if (plan.splits > 1) {
        const int64_t slot = at.split * partial.rows + lse_row;
        if (writes_lse) partial.states[slot] = softmax[i];
        store_row(partial.out + slot * partial.padded_columns(args.shape), out[i], Real(1));
      } else {
        if (writes_lse) static_cast<Real*>(args.lse)[lse_row] = softmax[i].lse();  // (E10)
        store_row(args.out.row<Element>(at.b, h, q_idx), out[i], softmax[i].inverse_sum());  // (E9)
      }
    }
  }
  template <typename Target>
  __device__ __forceinline__ void store_row(Target* target, const Real (&row)[kOuts],
                                            Real factor) const {
#pragma unroll
    for (int j = 0; j < kOuts; ++j) {
      if (out_column(j) < args.shape.D_v)
        target[out_column(j)] = static_cast<Target>(row[j] * factor);
    }
  }
};

template <typename Element, int kOutColumns, int kKeys>
__global__ void __launch_bounds__(128, 2) simt_forward_kernel(
    const __grid_constant__ ForwardArgs args, const __grid_constant__ TilePlan plan,
    const __grid_constant__ SplitBuffers<typename SimtTraits<Element>::Real> partial,
    bool aligned) {
  using Block = SimtBlock<Element, kOutColumns, kKeys>;
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
    const bool masked = args.mask.tile_needs_mask(query_begin, query_end, kv, kv + Config::kTileN);
    if (masked) block.hide(kv);
    block.update_softmax();  // (E6), (E7), (E8) for the sums
    for (int n = 0; n < Config::kTileN; n += Config::kSliceN) {
      const int here = next_slice();
      if (n + Config::kSliceN < Config::kTileN) {
        block.load_v(buffer, kv + n + Config::kSliceN);
      } else if (kv + Config::kTileN < keys.end) {
        block.load_qk(buffer, kv + Config::kTileN, 0);
      }
      if (masked && args.mask.is_banded() && block.has_nonfinite(here)) {
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
