// SPDX-License-Identifier: BSD-3-Clause
// What one warp holds and does in the tensor-core backward. Fragment layouts: cuda/fragment.cuh.
// Lane 4g + t. Of S^T and dP^T a thread holds keys g and g + 8 of two row atoms and queries 2t,
// 2t + 1 of each n8 tile; of dK and dV the same keys and two columns of each n8 tile.
#pragma once

#include "core/mask.h"
#include "core/softmax_row.h"
#include "cuda/arithmetic.cuh"
#include "cuda/backward_plan.h"
#include "cuda/fragment.cuh"
#include "cuda/portable/backward_config.h"
#include "cuda/portable/warp_product.cuh"
#include "cuda/ptx/barrier.cuh"

namespace online_attention::cuda::portable {

// A launch.
struct BackwardCall {
  BackwardArgs args;
  BackwardPlan plan;
  const float* delta;  // [B, H, S_q]
  const float* lse2;   // [B, H, S_q]: see backward_row_terms
  // fp32 sums of dQ before the scale: for each query tile of each head the fragments of add_dq,
  // [row atom][n8 tile][thread][4]. nullptr: dQ is not asked for.
  float* dq_sums;
  // Of deterministic calls: how many blocks have started, then for each query tile how many have
  // added to its dQ. Else nullptr.
  int32_t* turns;
  float factor_log2;  // of scores: scale * log2(e)
  bool aligned;       // every row of every tensor is readable in 16-byte pieces
  float keep_scale;   // of dropout; 1 without
};

// Which architecture's code holds the kernels of a class of shared-memory sizes.
ONLINE_ATTENTION_HD constexpr bool runs_on(SmemClass size, int cuda_arch) {
  if (size == SmemClass::turing) return cuda_arch < 800;
  return cuda_arch >= (size == SmemClass::large ? 900 : 800);
}

template <typename Element, BackwardConfig kConfig>
struct BackwardTile {
  static constexpr int kAtoms = 2;  // 32 keys of a warp
  static constexpr int kQueryTiles = kConfig.queries_per_warp() / 8;
  static constexpr int kDimTiles = kConfig.head_dim / kConfig.column_warps() / 8;
  static constexpr int kDqTiles = kConfig.head_dim / kConfig.dq_column_warps() / 8;
  static_assert(kDimTiles % 2 == 0 && kDqTiles % 2 == 0);
  static_assert(kQueryTiles == 1 || kQueryTiles % 2 == 0);
  using Rows = SmemTile<kConfig.head_dim>;  // K, V, Q, dO
  using Pairs = SmemTile<kConfig.tile_m>;   // P^T, dS^T: a row for each key

  const BackwardCall& call;
  uint32_t smem;
  float dk[kAtoms][kDimTiles][4] = {};
  float dv[kAtoms][kDimTiles][4] = {};
  bool marked = false;  // whether some key of the block holds Inf or NaN; see mark_nonfinite_keys

  __device__ __forceinline__ BackwardTile(const BackwardCall& call, uint32_t smem)
      : call(call), smem(smem) {}

  // Shared memory.
  __device__ __forceinline__ uint32_t k_smem() const { return smem; }
  __device__ __forceinline__ uint32_t v_smem() const { return smem + kConfig.kv_tile_bytes(); }
  __device__ __forceinline__ uint32_t q_smem(int stage) const {
    return smem + 2 * kConfig.kv_tile_bytes() + stage * kConfig.q_tile_bytes();
  }
  __device__ __forceinline__ uint32_t dout_smem(int stage) const {
    return q_smem(kConfig.stages) + stage * kConfig.q_tile_bytes();
  }
  __device__ __forceinline__ uint32_t p_smem() const { return q_smem(2 * kConfig.stages); }
  __device__ __forceinline__ uint32_t ds_smem(int buffer) const {
    return p_smem() + (1 + buffer) * kConfig.pair_tile_bytes();
  }
  __device__ __forceinline__ uint32_t row_terms(int buffer) const {
    return p_smem() + 3 * kConfig.pair_tile_bytes() + buffer * kConfig.row_terms_bytes();
  }
  __device__ __forceinline__ uint32_t delta_terms(int buffer) const {
    return row_terms(buffer) + 4 * kConfig.tile_m;
  }
  __device__ __forceinline__ uint32_t key_marks() const { return row_terms(2); }
  __device__ __forceinline__ uint32_t place_smem() const {
    return key_marks() + 4 * kConfig.tile_n;
  }

  // This warp's place.
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x / 32u); }
  __device__ __forceinline__ static int key_warp() { return warp() % kConfig.key_warps(); }
  __device__ __forceinline__ static int column_warp() { return warp() / kConfig.key_warps(); }
  __device__ __forceinline__ static int dq_row_warp() { return warp() % kConfig.dq_row_warps(); }
  __device__ __forceinline__ static int dq_column_warp() { return warp() / kConfig.dq_row_warps(); }
  // Of the block's keys, the one in this thread's register row r, 0 <= r < 4.
  __device__ __forceinline__ static int key(int r) {
    return 32 * key_warp() + 8 * r + static_cast<int>(lane_index() / 4);
  }
  // Of the step's queries, the first of this thread's two in n8 tile n of the scores.
  __device__ __forceinline__ static int query(int n) {
    return column_warp() * kConfig.queries_per_warp() + 8 * n +
           static_cast<int>(lane_index() % 4 * 2);
  }
  // First of this thread's two columns in n8 tile n of dK and dV, whose pairs of tiles the column
  // warps take in turn.
  __device__ __forceinline__ static int column(int n) {
    return 16 * (n / 2 * kConfig.column_warps() + column_warp()) + n % 2 * 8 +
           static_cast<int>(lane_index() % 4 * 2);
  }
  // Until the warps that share this warp's keys have stored their P^T and dS^T.
  __device__ __forceinline__ static void wait_for_key_warps() {
    if constexpr (kConfig.column_warps() == 1) {
      __syncwarp();
    } else {
      ptx::barrier_sync(1 + key_warp(), 32 * kConfig.column_warps());
    }
  }

  __device__ __forceinline__ RowSource<Element> source(const Element* data, int64_t stride,
                                                       int64_t rows, int64_t length) const {
    return {data,        stride, 0, 1, static_cast<int32_t>(rows), static_cast<int32_t>(length),
            call.aligned};
  }

  // The products.
  using Scores = float[kAtoms][kQueryTiles][4];
  using DqSums = float[kConfig.dq_row_atoms][kDqTiles][4];
  static constexpr int kKeyRowBytes = 32 * Rows::kRowBytes;

  __device__ __forceinline__ void multiply_rows(Scores& acc, uint32_t keys,
                                                uint32_t queries) const {
    const uint32_t q0 = column_warp() * kConfig.queries_per_warp() * Rows::kRowBytes;
    multiply_abt<Element, kConfig.head_dim>(
        acc, base_a<kConfig.head_dim>(keys + key_warp() * kKeyRowBytes),
        base_bt<kConfig.head_dim, kQueryTiles == 1>(queries + q0));
  }
  __device__ __forceinline__ void multiply_k_q(Scores& acc, int stage) const {
    multiply_rows(acc, k_smem(), q_smem(stage));
  }
  __device__ __forceinline__ void multiply_v_dout(Scores& acc, int stage) const {
    multiply_rows(acc, v_smem(), dout_smem(stage));
  }
  __device__ __forceinline__ void multiply_pairs(float (&acc)[kAtoms][kDimTiles][4], uint32_t pairs,
                                                 uint32_t queries) const {
    multiply_ab<Element, kConfig.tile_m, kConfig.head_dim, kConfig.column_warps()>(
        acc, base_a<kConfig.tile_m>(pairs + 32 * key_warp() * Pairs::kRowBytes),
        base_b<kConfig.head_dim>(queries, 2 * column_warp()));
  }
  __device__ __forceinline__ void multiply_p_dout(int stage) {
    multiply_pairs(dv, p_smem(), dout_smem(stage));
  }
  __device__ __forceinline__ void multiply_ds_q(int stage, int buffer) {
    multiply_pairs(dk, ds_smem(buffer), q_smem(stage));
  }
  __device__ __forceinline__ void multiply_ds_k(DqSums& acc, int buffer) const {
    multiply_atb<Element, kConfig.tile_n, kConfig.tile_m, kConfig.head_dim,
                 kConfig.dq_column_warps()>(
        acc, base_at<kConfig.tile_m>(ds_smem(buffer), 2 * kConfig.dq_row_atoms * dq_row_warp()),
        base_b<kConfig.head_dim>(k_smem(), 2 * dq_column_warp()));
  }

  // (E25) P from the scores, in place; 0 where a bias has made a score -inf.
  template <bool kBiased = false>
  __device__ __forceinline__ void weigh(Scores& s, int buffer) const {
    if (marked && !kBiased) add_key_marks(s);
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      float lse2[2];
      load_row_terms(lse2, row_terms(buffer), n);
#pragma unroll
      for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& x = s[atom][n][c];
          const float exponent = (kBiased ? x : x * call.factor_log2) - lse2[c % 2];
          const bool hidden = kBiased && x == -kInfinity<float>;
          // At most 1, whatever the rounding of a huge lse.
          x = hidden ? 0 : exp2_of(min_or_nan(exponent, 0.0f));
        }
      }
    }
  }
  // (E29) dS = P (dP - delta), in place of dP.
  __device__ __forceinline__ void subtract_delta(Scores& dp, const Scores& p, int buffer) const {
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      float delta[2];
      load_row_terms(delta, delta_terms(buffer), n);
#pragma unroll
      for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          dp[atom][n][c] = p[atom][n][c] * (dp[atom][n][c] - delta[c % 2]);
        }
      }
    }
  }
  __device__ __forceinline__ static void load_row_terms(float (&two)[2], uint32_t terms, int n) {
    uint32_t words[2];
    ptx::load_shared(words, terms + 4 * query(n));
    two[0] = __uint_as_float(words[0]);
    two[1] = __uint_as_float(words[1]);
  }

  // Zeros where the mask hides, whatever was there. Of the step's queries, counted from this
  // thread's first, the key of register row r is seen by [first, last].
  __device__ __forceinline__ void hide(Scores& x, int32_t q_begin, int32_t kv_begin) const {
    const Mask& mask = call.args.mask;
    const int32_t q_first = q_begin + query(0);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int32_t kv_idx = kv_begin + key(r);
      const QRange seen_by =
          mask.q_range(kv_idx, kv_idx + 1, static_cast<int32_t>(call.args.shape.S_q));
      const int32_t first = seen_by.begin - q_first, last = seen_by.end - 1 - q_first;
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& element = x[r / 2][n][r % 2 * 2 + j];
          element = 8 * n + j >= first && 8 * n + j <= last ? element : 0;
        }
      }
    }
  }

  // Zeros where P is 0: a hidden pair's dP may be Inf or NaN.
  __device__ __forceinline__ static void drop_without_weight(Scores& ds, const Scores& p) {
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) ds[atom][n][c] = p[atom][n][c] == 0 ? 0 : ds[atom][n][c];
      }
    }
  }

  // Rounds P^T or dS^T to Element and stores this warp's part. kDropped: 0 for what has a sign.
  template <bool kDropped = false>
  __device__ __forceinline__ void store_pairs(const Scores& x, uint32_t tile) const {
    const auto kept = [](float value) { return kDropped ? max_or_nan(value, 0.0f) : value; };
    const uint32_t base = tile +
                          Pairs::offset(key(0), column_warp() * (kConfig.queries_per_warp() / 8)) +
                          lane_index() % 4 * 4;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float (&four)[4] = x[r / 2][n];
        ptx::store_shared(Pairs::advance(base, n) + 8 * r * Pairs::kRowBytes,
                          pack_pair<Element>(kept(four[r % 2 * 2]), kept(four[r % 2 * 2 + 1])));
      }
    }
  }

  // What is hidden does not exist (E24), yet 0 * NaN is NaN: under a mask, Inf and NaN must leave
  // the tiles that P, dS multiply. All threads.
  template <int kBytes, typename Found>
  __device__ __forceinline__ static void clear_nonfinite(uint32_t tile, const Found& found) {
#pragma unroll 1
    for (int at = threadIdx.x * kChunkBytes; at < kBytes; at += kConfig.threads() * kChunkBytes) {
      uint32_t words[4];
      ptx::load_shared(words, tile + at);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t finite = without_nonfinite<Element>(words[w]);
        if (finite == words[w]) continue;
        found(at);
        ptx::store_shared(tile + at + 4 * w, finite);
      }
    }
  }
  // Whether this thread's term of the step's rows is finite: if a query or a dO holds Inf or NaN,
  // its lse or its delta is not.
  __device__ __forceinline__ bool row_terms_finite(int buffer) const {
    if (threadIdx.x >= 2 * kConfig.tile_m) return true;
    return isfinite(__uint_as_float(ptx::load_shared(row_terms(buffer) + 4 * threadIdx.x)));
  }
  // Queries of a step. Of Q no trace need be kept: a query that is not finite has no finite P.
  // Returns whether dO had such elements; add_nonfinite_dout gives them to the keys its rows see.
  __device__ __forceinline__ bool clear_nonfinite_queries(int stage) const {
    bool found = false;
    clear_nonfinite<kConfig.q_tile_bytes()>(q_smem(stage), [](int) {});
    clear_nonfinite<kConfig.q_tile_bytes()>(dout_smem(stage), [&](int) { found = true; });
    return __syncthreads_or(found) != 0;
  }
  // Keys of the block, once: those that hold Inf or NaN are cleared for good and get a NaN mark,
  // which makes P and dS of the queries that see them NaN. K must have arrived for this thread.
  __device__ __forceinline__ void mark_nonfinite_keys() {
    if (threadIdx.x < kConfig.tile_n) ptx::store_shared(key_marks() + 4 * threadIdx.x, 0u);
    __syncthreads();
    marked = __syncthreads_or(
                 has_nonfinite<Element, kConfig.kv_tile_bytes(), kConfig.threads()>(k_smem())) != 0;
    if (!marked) return;
    clear_nonfinite<kConfig.kv_tile_bytes()>(k_smem(), [&](int at) {
      ptx::store_shared(key_marks() + 4 * (at / Rows::kRowBytes), 0x7fffffffu);
    });
    __syncthreads();
  }
  __device__ __forceinline__ void add_key_marks(Scores& s) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float mark = __uint_as_float(ptx::load_shared(key_marks() + 4 * key(r)));
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) s[r / 2][n][r % 2 * 2 + j] += mark;
      }
    }
  }
  // Adds Inf and NaN elements of dO, which multiply_p_dout has seen as zeros, to the dV of the keys
  // that their rows see; `hidden(q_idx, kv_idx)` tells what hides besides the mask. Exact weights
  // are positive, so the sum is what the weighted one would be.
  template <typename Hidden>
  __device__ __forceinline__ void add_nonfinite_dout(const Element* dout, int32_t q_begin,
                                                     int32_t kv_begin, const Hidden& hidden) {
    const auto s_q = static_cast<int32_t>(call.args.shape.S_q);
    const int32_t q_end = min(q_begin + kConfig.tile_m, s_q);
#pragma unroll 1
    for (int32_t q_idx = q_begin; q_idx < q_end; ++q_idx) {
      const Element* row = dout + q_idx * call.args.dout.stride_s;
      const KvRange seen = call.args.mask.kv_range(q_idx, q_idx + 1);
      bool sees[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int32_t kv_idx = kv_begin + key(r);
        sees[r] = kv_idx >= seen.begin && kv_idx < seen.end && !hidden(q_idx, kv_idx);
      }
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (column(n) + j >= call.args.shape.D_v) continue;
          const auto value = static_cast<float>(row[column(n) + j]);
          if (isfinite(value)) continue;
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            if (sees[r]) dv[r / 2][n][r % 2 * 2 + j] += value;
          }
        }
      }
    }
  }

  // Rounds this warp's rows of a gradient into a tile, for store_tile.
  __device__ __forceinline__ static void stage_rows(const float (&x)[kAtoms][kDimTiles][4],
                                                    uint32_t tile, float factor) {
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float (&four)[4] = x[r / 2][n];
        ptx::store_shared(
            tile + Rows::offset(key(r), column(n) / 8) + column(n) % 8 * 2,
            pack_pair<Element>(four[r % 2 * 2] * factor, four[r % 2 * 2 + 1] * factor));
      }
    }
  }
  __device__ __forceinline__ static void stage_dq(const DqSums& dq, uint32_t tile, float factor) {
#pragma unroll
    for (int atom = 0; atom < kConfig.dq_row_atoms; ++atom) {
#pragma unroll
      for (int n = 0; n < kDqTiles; ++n) {
        const int chunk = 2 * (n / 2 * kConfig.dq_column_warps() + dq_column_warp()) + n % 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * (kConfig.dq_row_atoms * dq_row_warp() + atom) + 8 * half +
                          static_cast<int>(lane_index() / 4);
          ptx::store_shared(tile + Rows::offset(row, chunk) + lane_index() % 4 * 4,
                            pack_pair<Element>(dq[atom][n][2 * half] * factor,
                                               dq[atom][n][2 * half + 1] * factor));
        }
      }
    }
  }
};

}  // namespace online_attention::cuda::portable
