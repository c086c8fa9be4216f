// SPDX-License-Identifier: BSD-3-Clause
// What a bias and dropout do to the pairs of one step of the tensor-core backward, where a thread
// holds them: see backward_tile.cuh.
#pragma once

#include "core/dropout.h"
#include "cuda/bias.cuh"
#include "cuda/portable/backward_tile.cuh"

namespace online_attention::cuda::portable {

template <typename Element, BackwardConfig kConfig>
struct BackwardPairs {
  using Tile = BackwardTile<Element, kConfig>;
  using Scores = typename Tile::Scores;

  const BackwardCall& call;
  int32_t b, h;               // of the queries
  int32_t q_begin, kv_begin;  // of the step and of the block

  // Brings the scores to base-2 units and adds the bias; -inf where it hides, and nowhere else:
  // P of a hidden pair is 0 even in a row whose lse is NaN. Rows that do not exist are read as the
  // last that does; `hide` comes later.
  __device__ __forceinline__ void add_bias(Scores& s) const {
    constexpr float kLowestScore = -1e37f;  // its sum with kLowestBias is finite
    const Bias& bias = call.args.bias;
    const auto last_query = static_cast<int32_t>(call.args.shape.S_q) - 1;
    const auto last_key = static_cast<int32_t>(call.args.shape.S_kv) - 1;
    int64_t keys[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      keys[r] = b * bias.stride_b + h * bias.stride_h +
                min(kv_begin + Tile::key(r), last_key) * bias.stride_kv;
    }
    // A few n8 tiles at a time: as many loads in flight as registers allow.
    constexpr int kTogether = Tile::kQueryTiles < 4 ? Tile::kQueryTiles : 4;
#pragma unroll
    for (int first = 0; first < Tile::kQueryTiles; first += kTogether) {
      float added[kTogether][8];
      with_bias_type<Element>(bias, [&](auto type) {
        const auto* elements = static_cast<const decltype(type)*>(bias.data);
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int32_t q_idx = q_begin + Tile::query(first + n) + e / 4;
            const int64_t row = min(q_idx, last_query) * bias.stride_q;
            added[n][e] = bias_of<float>(elements[row + keys[e % 4]]);
          }
        }
      });
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int r = e % 4;
          float& x = s[r / 2][first + n][r % 2 * 2 + e / 4];
          const float score = max_or_nan(rounded_product(x, call.factor_log2), kLowestScore);
          x = biased(score, added[n][e]);
        }
      }
    }
  }

  // Changes the sign of P of dropped pairs: dV takes them as 0, dS needs their size. The four keys
  // of a thread take half of the bits that one call of the generator gives a query, the lane of the
  // neighbouring key the other half. So each of the two makes a call for one of their two queries.
  __device__ __forceinline__ void mark_dropped(Scores& p) const {
    const Dropout& dropout = call.args.dropout;
    const uint32_t head = b * static_cast<uint32_t>(call.args.shape.H) + h;
    const int32_t generator_call = Dropout::call_of(kv_begin + Tile::key(0));
    const int odd = static_cast<int>(lane_index() / 4 % 2);  // of this lane's keys
    const uint32_t own_half = odd ? 0x7632 : 0x5410, other_half = odd ? 0x5410 : 0x7632;
#pragma unroll
    for (int n = 0; n < Tile::kQueryTiles; ++n) {
      const Philox4x32 made = dropout.bits(head, q_begin + Tile::query(n) + odd, generator_call);
      uint32_t own[2], received[2];  // keys r = 0, 1 and r = 2, 3 of query `odd` and of the other
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t low = made.words[2 * i], high = made.words[2 * i + 1];
        own[i] = __byte_perm(low, high, own_half);
        received[i] = __shfl_xor_sync(0xffffffffu, __byte_perm(low, high, other_half), 4);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Philox4x32 bits{{j == odd ? own[0] : received[0], j == odd ? own[1] : received[1]}};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float& x = p[r / 2][n][r % 2 * 2 + j];
          x = dropout.keeps(bits, r) ? x : -x;
        }
      }
    }
  }

  // (E29) with dropout: dS = P (Z dP - delta), in place of dP; Z is keep_scale, and 0 where P has a
  // sign.
  __device__ __forceinline__ void subtract_delta(const Tile& tile, Scores& dp, const Scores& p,
                                                 int buffer) const {
#pragma unroll
    for (int n = 0; n < Tile::kQueryTiles; ++n) {
      float delta[2];
      tile.load_row_terms(delta, tile.delta_terms(buffer), n);
#pragma unroll
      for (int atom = 0; atom < Tile::kAtoms; ++atom) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float kept = fmaf(dp[atom][n][c], call.keep_scale, -delta[c % 2]);
          const bool dropped = __float_as_int(p[atom][n][c]) < 0;
          dp[atom][n][c] = fabsf(p[atom][n][c]) * (dropped ? -delta[c % 2] : kept);
        }
      }
    }
  }
};

}  // namespace online_attention::cuda::portable
