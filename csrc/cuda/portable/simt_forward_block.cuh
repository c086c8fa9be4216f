// SPDX-License-Identifier: BSD-3-Clause
// What a thread of the SIMT forward kernel holds and does.
//
// The 128 threads form an 8 x 16 grid: thread (ty, tx) holds rows ty + 8i, score columns tx + 16j,
// and output columns in groups of kVector at tx * kVector + 16 * kVector * j.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/softmax_row.h"
#include "cuda/arithmetic.cuh"
#include "cuda/portable/simt_pairs.cuh"
#include "cuda/portable/simt_slice.cuh"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::portable {

// One thread's part of the block, and the slices it works from.
template <typename Element, int kOutColumns, int kKeys, bool kModified>
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
  __device__ __forceinline__ int32_t head_of(int32_t row, int32_t q_idx) const {
    return at.h + row - q_idx * plan.pack;
  }
  __device__ __forceinline__ int32_t first_column() const {
    return at.column_block * Config::kColumns;
  }

  // This thread's first probability of row i; the next are kThreadsX apart.
  __device__ __forceinline__ Real* p_row(int i) const {
    return probabilities + (ty + Config::kThreadsY * i) * Config::kPitchP + tx;
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

  __device__ __forceinline__ bool has_bias() const { return kModified && args.bias.exists(); }
  // The bias of a packed row; that of the last row where there is none.
  template <typename BiasElement>
  __device__ __forceinline__ const BiasElement* bias_row(int32_t row) const {
    const int32_t existing = min(row, plan.rows - 1), q_idx = plan.query_of(existing);
    return args.bias.row<BiasElement>(at.b, head_of(existing, q_idx), q_idx);
  }

  // Scores become base-2 units, with the bias added; those that it hides become -inf, whatever they
  // were. The bias passes through the places of the thread's own probabilities, a row at a time:
  // there are no registers for the addresses of all.
  __device__ __forceinline__ void add_bias(int32_t kv) {
    with_bias_type<Element>(args.bias, [&](auto element) {
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
        fetch_bias<Config::kThreadsX, kScores>(p_row(i), bias_row<decltype(element)>(packed_row(i)),
                                               args.bias.stride_kv, kv + tx,
                                               static_cast<int32_t>(args.shape.S_kv));
      }
    });
    const Real scale_log2 = static_cast<Real>(args.scale.log2);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        const Real bias = p_row(i)[Config::kThreadsX * j];
        scores[i][j] = bias == -kInfinity<Real> ? -kInfinity<Real>
                                                : fma(scores[i][j], scale_log2, bias_log2(bias));
      }
    }
  }

  // Whether the mask or the bias hides a pair.
  __device__ __forceinline__ bool hides(int32_t row, int32_t kv_idx) const {
    if (!args.mask.visible(plan.query_of(row), kv_idx)) return true;
    bool hidden = false;
    if (args.bias.exists()) {
      with_bias_type<Element>(args.bias, [&](auto element) {
        const auto* elements = bias_row<decltype(element)>(row);
        hidden = bias_of<Real>(elements[kv_idx * args.bias.stride_kv]) == -kInfinity<Real>;
      });
    }
    return hidden;
  }
  // Of this thread's rows and kVector keys: bit kVector * i + e tells whether row i does not see
  // key kv + e. Not unrolled: seldom needed.
  __device__ __forceinline__ uint32_t hidden_pairs(int32_t kv) const {
    static_assert(kRows * kVector <= 32);
    uint32_t hidden = 0;
#pragma unroll 1
    for (int bit = 0; bit < kRows * kVector; ++bit) {
      if (hides(packed_row(bit / kVector), kv + bit % kVector)) hidden |= 1u << bit;
    }
    return hidden;
  }

  // Probabilities that dropout drops become 0. This thread's own, and after they have been summed.
  __device__ __forceinline__ void drop(int32_t kv) const {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) {
      const int32_t row = packed_row(i), q_idx = plan.query_of(row);
      const int64_t head = at.b * args.shape.H + head_of(row, q_idx);
      for_dropped<Config::kThreadsX, kScores>(args.dropout, head, q_idx, kv, tx,
                                              [&](int j) { p_row(i)[Config::kThreadsX * j] = 0; });
    }
  }

  // (E6), (E7), and (E8) for the sums; the probabilities move to shared memory. A row's sum stays
  // spread over the 16 threads that share the row.
  __device__ __forceinline__ void update_softmax() {
    const Real scale_log2 = has_bias() ? Real(1) : static_cast<Real>(args.scale.log2);
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
#pragma unroll
      for (int j = 0; j < kScores; ++j) {
        const Real p = softmax[i].weight(scores[i][j] * factor);
        p_row(i)[Config::kThreadsX * j] = p;
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
      const uint32_t hidden = kExact && kModified ? hidden_pairs(kv + slice_begin + n) : 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
#pragma unroll
        for (int j = 0; j < kOuts; j += kVector) {
          const auto values =
              vector_at(v_slice + (n + e) * Config::kColumns + j * Config::kThreadsX);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if constexpr (kExact && kModified) {
              if (hidden >> (kVector * i + e) & 1) continue;
            } else if constexpr (kExact) {
              if (!args.mask.visible(query(i), kv + slice_begin + n + e)) continue;
            }
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
    const Real keep_scale = kModified ? args.dropout.keep_scale<Real>() : Real(1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t row = packed_row(i);
      if (row >= plan.rows) continue;
      const int32_t q_idx = plan.query_of(row);
      const int32_t h = head_of(row, q_idx);
      const int64_t lse_row = (int64_t{at.b} * args.shape.H + h) * args.shape.S_q + q_idx;
      const bool writes_lse = tx == 0 && at.column_block == 0;
      if (plan.splits > 1) {
        const int64_t slot = at.split * partial.rows + lse_row;
        if (writes_lse) partial.states[slot] = softmax[i];
        store_row(partial.out + slot * partial.padded_columns(args.shape), out[i], keep_scale);
      } else {
        if (writes_lse) static_cast<Real*>(args.lse)[lse_row] = softmax[i].lse();  // (E10)
        store_row(args.out.row<Element>(at.b, h, q_idx), out[i],
                  softmax[i].inverse_sum() * keep_scale);  // (E9)
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

}  // namespace online_attention::cuda::portable
