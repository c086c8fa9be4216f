// SPDX-License-Identifier: BSD-3-Clause
// What a consumer warpgroup holds in registers, 64 query rows, and what it does with them. Layout:
// see product.cuh; probabilities go from one product into the next without leaving their thread.
#pragma once

#include "core/mask.h"
#include "core/softmax_row.h"
#include "cuda/arithmetic.cuh"
#include "cuda/fragment.cuh"
#include "cuda/hopper/config.h"
#include "cuda/hopper/product.cuh"
#include "cuda/ptx/approximate.cuh"
#include "cuda/ptx/global.cuh"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::hopper {

// Word i of lane t of a quad goes to word t of its lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const uint32_t t = ptx::thread_index();
#pragma unroll
  for (uint32_t step = 1; step < 4; step *= 2) {
    const bool upper = (t & step) != 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      uint32_t &low = words[i], &high = words[i + step];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, step);
      (upper ? low : high) = got;
    }
  }
}

template <typename Element, ForwardConfig kConfig>
struct WarpgroupTile : WarpgroupThread {
  static constexpr int kScores = kConfig.tile_n / 2;
  static constexpr int kOuts = kConfig.value_dim / 2;
  static constexpr float kSlack = 8;  // see SoftmaxRow::raise_lazily

  // Those of one key tile: S, then exponents, then probabilities before rounding.
  using Scores = float[kScores];
  // Of its first keys alone.
  using FirstScores = float[kConfig.first_keys > 0 ? kConfig.first_keys / 2 : kScores];

  float out[kOuts];
  uint32_t p[kScores / 2];
  SoftmaxRow<float> softmax[2];
  float alpha[2];
  float factor;  // of the scores of this tile: scale_log2, or 1 if they have been multiplied

  // Starts S = Q K^T, of all or the first keys of the tile.
  template <int kCount>
  __device__ __forceinline__ void start_scores(float (&scores)[kCount], uint32_t q, uint32_t k) {
    start_rows_by_rows<Element, kConfig.head_dim, 64 * 128, kConfig.tile_n * 128>(scores, q, k);
  }
  // Starts O += P V.
  __device__ __forceinline__ void start_out(uint32_t v) {
    start_registers_by_columns<Element, kConfig.tile_n, kConfig.tile_n * 128>(out, p, v);
  }

  template <int kCount>
  __device__ __forceinline__ static void scale_scores(float (&scores)[kCount], float factor) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = rounded_product(scores[i], factor);
  }

  // Which of a thread's columns of a row, 8n + j as bit 2n + j, lie below `end`.
  __device__ __forceinline__ static uint32_t columns_below(int32_t end) {
    const int32_t inside = min(max(end, 0), kConfig.tile_n);
    const int32_t count = inside / 8 * 2 + min(inside % 8, 2);
    return count == 32 ? 0xffffffffu : (1u << count) - 1;
  }
  // Hides what the mask hides: those scores become -inf, whatever they were.
  // `row_begin` is the warpgroup's first row.
  template <int kCount>
  __device__ __forceinline__ void hide(float (&scores)[kCount], const Mask& mask,
                                       const TilePlan& plan, int32_t row_begin, int32_t kv) {
    static_assert(kConfig.tile_n <= 128, "a word has a bit for each of the thread's columns");
    const int32_t kv_lane = kv + column();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t q_idx = plan.query_of(row_begin + row(h));
      const KvRange range = mask.kv_range(q_idx, q_idx + 1);
      const uint32_t seen =
          columns_below(range.end - kv_lane) & ~columns_below(range.begin - kv_lane);
#pragma unroll
      for (int i = 2 * h; i < kCount; i += i % 2 == 0 ? 1 : 3) {
        if ((seen >> (i / 4 * 2 + i % 2) & 1) == 0) scores[i] = -kInfinity<float>;
      }
    }
  }

  // No key has been seen.
  __device__ __forceinline__ void reset() {
    reset_softmax();
    clear();
  }
  __device__ __forceinline__ void reset_softmax() {
#pragma unroll
    for (SoftmaxRow<float>& row : softmax) row = {};
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : out) x = 0;
  }

  // (E6) Raises the rows' maxima by this tile. Returns whether the warp's outputs must be brought
  // to the new ones, by alpha: rarely after the first tiles.
  __device__ __forceinline__ bool raise_maxima(Scores& scores, float scale_log2) {
    bool beyond = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Of the thread's own columns: lanes ask each other only where it matters. Read as integers,
      // of which the device takes three at once, numbers keep their order if one of them is
      // positive; if none is, none is beyond a maximum above -kSlack.
      int32_t even = __float_as_int(scores[2 * h]), odd = even;
#pragma unroll
      for (int n = 0; n < kConfig.tile_n / 8; ++n) {
        const int32_t a = __float_as_int(scores[4 * n + 2 * h]);
        const int32_t b = __float_as_int(scores[4 * n + 2 * h + 1]);
        int32_t& chain = n % 2 == 0 || kConfig.value_dim > 192 ? even : odd;  // if registers do
        chain = __vimax3_s32(chain, a, b);
      }
      const float m = softmax[h].m;
      beyond |= __int_as_float(max(even, odd)) * scale_log2 - m > kSlack ||
                __float_as_uint(m + kSlack) > __float_as_uint(kFusedUpTo<float>);
    }
    const bool raised = __any_sync(0xffffffffu, beyond);
    factor = scale_log2;
    if (raised) raise_to_tile(scores, scale_log2);
    return raised;
  }
  // The same by floating-point maxima of whole rows, whatever they are.
  template <int kCount>
  __device__ __forceinline__ void raise_to_tile(float (&scores)[kCount], float scale_log2) {
    factor = scale_log2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = scores[2 * h], odd = scores[2 * h + 1];
#pragma unroll
      for (int n = 1; n < kCount / 4; ++n) {
        even = max_of(even, scores[4 * n + 2 * h]);
        odd = max_of(odd, scores[4 * n + 2 * h + 1]);
      }
      const float tile_max = max_of(even, odd);
      alpha[h] = softmax[h].raise_lazily(quad_max(tile_max) * scale_log2, kSlack);
      softmax[h].absorb(alpha[h], 0);
    }
    const bool huge = __any_sync(0xffffffffu, fabsf(softmax[0].base()) > kFusedUpTo<float> ||
                                                  fabsf(softmax[1].base()) > kFusedUpTo<float>);
    if (huge) {
      scale_scores(scores, scale_log2);
      factor = 1;
    }
  }

  // (E7), (E8) Exponents, probabilities, sums and P of a key tile. Instructions are written in the
  // order in which they should be issued: an exponential takes 8 cycles of its pipe, and what
  // stands between two of them, for scores that come later or earlier, is free.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&scores)[kCount]) {
    constexpr int kLead = 8, kLag = 8;
    const float base[2] = {softmax[0].base(), softmax[1].base()};
    const auto exponent = [&](int i) { return fmaf(scores[i], factor, -base[i / 2 % 2]); };
    const auto round = [&](int pair) {
      p[pair] = pack_pair<Element>(scores[2 * pair], scores[2 * pair + 1]);
    };
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kLead; ++i) scores[i] = exponent(i);
#pragma unroll
    for (int i = 0; i < kCount + kLag; ++i) {
      if (i < kCount) scores[i] = exp2_of(scores[i]);
      if (i + kLead < kCount) scores[i + kLead] = exponent(i + kLead);
      if (i < kLag) continue;
      sums[i % 4] += scores[i - kLag];
      if (i % 2 != 0) round((i - kLag) / 2);
    }
#pragma unroll
    for (int pair = kCount / 2; pair < kScores / 2; ++pair) p[pair] = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) softmax[h].absorb(1, sums[2 * h] + sums[2 * h + 1]);
  }

  // (E9), (E10). The sum of a row that saw a key lies between 1 and 2^kSlack S_kv, where the
  // approximate instructions are good to 2^-22.
  __device__ __forceinline__ static float inverse_sum(const SoftmaxRow<float>& row) {
    return row.l == 0 ? 0 : ptx::reciprocal(row.l);
  }
  __device__ __forceinline__ static float lse(const SoftmaxRow<float>& row) {
    return (row.m + ptx::log2(row.l)) * static_cast<float>(kLn2);
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i] *= factor[i / 2 % 2];
  }

  // Writes the thread's two rows of the output, rounded, to out[h] where they exist, columns
  // [0, columns): a multiple of 8, on 16-byte boundaries.
  __device__ __forceinline__ void write_rows(Element* const (&to)[2], const bool (&exists)[2],
                                             int columns) const {
    const int t = lane() % 4;
#pragma unroll
    for (int n = 0; n < kConfig.value_dim / 8; n += 4) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t words[4];  // of columns 8 (n + i) + 2 t; then those of 8 (n + t) + 2 i
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = pack_pair<Element>(out[4 * (n + i) + 2 * h], out[4 * (n + i) + 2 * h + 1]);
        }
        transpose_quad(words);
        const int column = 8 * (n + t);
        ptx::store_if(to[h] + column, words, exists[h] && column < columns);
      }
    }
  }

  // The same in fp32, as they are.
  __device__ __forceinline__ void write_sums(float* const (&to)[2], int columns) const {
#pragma unroll
    for (int n = 0; n < kConfig.value_dim / 8; ++n) {
      const int column = 8 * n + lane() % 4 * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (to[h] == nullptr || column >= columns) continue;
        *reinterpret_cast<float2*>(to[h] + column) =
            make_float2(out[4 * n + 2 * h], out[4 * n + 2 * h + 1]);
      }
    }
  }
};

}  // namespace online_attention::cuda::hopper
