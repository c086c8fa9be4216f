// SPDX-License-Identifier: BSD-3-Clause
// What a consumer warpgroup of the backward holds in registers, 64 keys, and what it does with
// them. Layout of accumulators and A operands: see product.cuh. Rows are keys, columns are
// queries in S^T, P^T, dP^T and dS^T, and columns of the head in dK and dV; of dQ^T rows are
// columns of the head and columns are queries.
#pragma once

#include "core/mask.h"
#include "cuda/arithmetic.cuh"
#include "cuda/fragment.cuh"
#include "cuda/hopper/backward_config.h"
#include "cuda/hopper/product.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/stmatrix.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, BackwardConfig kConfig>
struct BackwardTile : WarpgroupThread {
  static constexpr int kPairs = kConfig.tile_m / 2;        // a thread's pairs of key and query
  static constexpr int kGradients = kConfig.head_dim / 2;  // its elements of dK, and of dV
  static constexpr int kDqs = kConfig.dq_queries() / 2;
  static constexpr int kRowBytes = BackwardConfig::kRowBytes;
  static constexpr int kKvBoxBytes = BackwardConfig::kTileN * kRowBytes;
  using Pairs = float[kPairs];
  using Rounded = uint32_t[kPairs / 2];
  using Dq = float[kDqs];

  float dk[kGradients];
  float dv[kGradients];
  uint32_t v[kConfig.held_values ? kConfig.head_dim / 4 : 1];

  // Starts S^T = K Q^T or dP^T = V dO^T; `keys` is where the group's rows are.
  __device__ __forceinline__ static void start_pairs(Pairs& acc, uint32_t keys, uint32_t queries) {
    start_rows_by_rows<Element, kConfig.head_dim, kKvBoxBytes, kConfig.q_box_bytes()>(acc, keys,
                                                                                      queries);
  }
  // Reads the group's rows of V, the A operands of dP^T = V dO^T.
  __device__ __forceinline__ void load_values(uint32_t values) {
    const int in_matrix = lane() % 8;
    const uint32_t source = values + (16 * warp() + lane() / 8 % 2 * 8 + in_matrix) * kRowBytes;
#pragma unroll
    for (int step = 0; step < kConfig.head_dim / 16; ++step) {
      const int chunk = (step % 4 * 2 + lane() / 16) ^ in_matrix;
      uint32_t words[4];
      ptx::ldmatrix_x4(words, source + step / 4 * kKvBoxBytes + chunk * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * step + i] = words[i];
    }
  }
  // Starts dP^T = V dO^T, V in registers.
  __device__ __forceinline__ void start_pairs_of_values(Pairs& acc, uint32_t dout) {
    const uint64_t b = smem_descriptor(dout, 0);
    ptx::held(v);
    ptx::held(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kConfig.head_dim / 16; ++step) {
      const int box = step / 4, in_box = step % 4 * 2;
      ptx::wgmma_rs<Element, ptx::Major::k>(
          acc, v + 4 * step, b + box * (kConfig.q_box_bytes() / 16) + in_box, step != 0);
    }
    ptx::wgmma_commit();
  }
  // Starts dV += P^T dO or dK += dS^T Q.
  __device__ __forceinline__ static void start_gradient(float (&acc)[kGradients], Rounded& pairs,
                                                        uint32_t queries) {
    start_registers_by_columns<Element, kConfig.tile_m, kConfig.q_box_bytes()>(acc, pairs, queries);
  }
  // Starts the group's part of dQ^T = K^T dS^T.
  __device__ __forceinline__ static void start_dq(Dq& acc, uint32_t k, uint32_t ds, int group) {
    constexpr bool kHalves = kConfig.boxes() == 1;
    const uint64_t a = smem_descriptor(kHalves ? k : k + group * kKvBoxBytes, 0);
    const uint64_t b =
        smem_descriptor(kHalves ? ds + group * kConfig.dq_queries() * kRowBytes : ds, 0);
    ptx::held(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < BackwardConfig::kTileN / 16; ++step) {
      const int box = step / 4, in_box = step % 4 * 2;
      ptx::wgmma_ss<Element, ptx::Major::mn, ptx::Major::k>(
          acc, a + step * (16 * kRowBytes / 16), b + box * (kConfig.q_box_bytes() / 16) + in_box,
          step != 0);
    }
    ptx::wgmma_commit();
  }

  // Four of the terms of this thread's columns: those of 8 (n + e) + column() + j are [2e + j].
  __device__ __forceinline__ static void load_terms(float (&four)[4], uint32_t terms, int n) {
    uint32_t words[4];
    ptx::load_shared(words, terms + (n * 8 + lane() % 4 * 4) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = __uint_as_float(words[i]);
  }

  // (E25) P from the scores, in place.
  __device__ __forceinline__ static void weigh(Pairs& p, float factor_log2, uint32_t lse2) {
#pragma unroll
    for (int n = 0; n < kConfig.tile_m / 8; n += 2) {
      float terms[4];
      load_terms(terms, lse2, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = p[4 * n + i];
        // At most 1, whatever the rounding of a huge lse.
        x = exp2_of(min_or_nan(x * factor_log2 - terms[i / 4 * 2 + i % 2], 0.0f));
      }
    }
  }
  // (E29) dS = P (dP - delta), in place of dP.
  __device__ __forceinline__ static void subtract_delta(Pairs& ds, const Pairs& p, uint32_t delta) {
#pragma unroll
    for (int n = 0; n < kConfig.tile_m / 8; n += 2) {
      float terms[4];
      load_terms(terms, delta, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = ds[4 * n + i];
        x = p[4 * n + i] * (x - terms[i / 4 * 2 + i % 2]);
      }
    }
  }
  __device__ __forceinline__ static void round(Rounded& rounded, const Pairs& x) {
#pragma unroll
    for (int i = 0; i < kPairs / 2; ++i) rounded[i] = pack_pair<Element>(x[2 * i], x[2 * i + 1]);
  }

  // Adds the marks of this thread's keys to their scores; `marks` is where the group's are.
  __device__ __forceinline__ static void add_key_marks(Pairs& p, uint32_t marks) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float mark = __uint_as_float(ptx::load_shared(marks + 4 * row(h)));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (i / 2 % 2 == h) p[i] += mark;
      }
    }
  }
  // Zeros in P where the mask hides, whatever was there; `kv` is the group's first key.
  __device__ __forceinline__ static void hide(Pairs& p, const Mask& mask, int32_t s_q,
                                              int32_t q_begin, int32_t kv) {
    const int32_t q_lane = q_begin + column();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t kv_idx = kv + row(h);
      const QRange seen_by = mask.q_range(kv_idx, kv_idx + 1, s_q);
      const int32_t first = seen_by.begin - q_lane, last = seen_by.end - 1 - q_lane;
#pragma unroll
      for (int n = 0; n < kConfig.tile_m / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = p[4 * n + 2 * h + j];
          x = 8 * n + j >= first && 8 * n + j <= last ? x : 0;
        }
      }
    }
  }
  // Zeros in dS where P is 0: a hidden pair's dP may be Inf or NaN.
  __device__ __forceinline__ static void drop_without_weight(Pairs& ds, const Pairs& p) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) ds[i] = p[i] == 0 ? 0 : ds[i];
  }

  // Writes dS, rounded, a row for each query; `box` is where the group's columns are.
  __device__ __forceinline__ static void store_ds(const Rounded& ds, uint32_t box) {
    const int at = lane(), in_matrix = at % 8, matrix = at / 8;
    const int chunk = (2 * warp() + matrix % 2) ^ in_matrix;
    const uint32_t target = box + (matrix / 2 * 8 + in_matrix) * kRowBytes + chunk * 16;
#pragma unroll
    for (int n = 0; n < kConfig.tile_m / 8; n += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = ds[2 * n + i];
      ptx::stmatrix_x4_trans(target + n * 8 * kRowBytes, words);
    }
  }
  // Writes this warp's part of dQ^T, see dq_place.
  __device__ __forceinline__ static void store_dq(const Dq& dq, uint32_t target) {
    const uint32_t place = target + lane() * 16;
#pragma unroll
    for (int i = 0; i < kDqs; i += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = __float_as_uint(dq[i + j]);
      ptx::store_shared(place + i * 128, words);
    }
  }
  // Writes the warp's 16 rows of a gradient, rounded, as boxes of 16 rows.
  __device__ __forceinline__ static void store_gradient(const float (&x)[kGradients], float factor,
                                                        uint32_t boxes) {
    const int at = lane(), in_matrix = at % 8;
    const uint32_t target = boxes + (at / 8 % 2 * 8 + in_matrix) * kRowBytes;
#pragma unroll
    for (int n = 0; n < kConfig.head_dim / 8; n += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack_pair<Element>(x[4 * n + 2 * i] * factor, x[4 * n + 2 * i + 1] * factor);
      }
      const int chunk = (n % 8 + at / 16) ^ in_matrix;
      ptx::stmatrix_x4(target + n / 8 * (16 * kRowBytes) + chunk * 16, words);
    }
  }
};

}  // namespace online_attention::cuda::hopper
