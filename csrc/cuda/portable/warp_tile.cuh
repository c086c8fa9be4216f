// SPDX-License-Identifier: BSD-3-Clause
// What one warp holds and does in the tensor-core kernel: its rows' scores, softmax states and
// outputs in registers, the two matrix products and the mask. Fragment layouts:
// cuda/fragment.cuh. Lane 4g + t; every thread holds rows g and g + 8 of each row atom.
#pragma once

#include "core/dropout.h"
#include "core/mask.h"
#include "core/softmax_row.h"
#include "cuda/arithmetic.cuh"
#include "cuda/bias.cuh"
#include "cuda/fragment.cuh"
#include "cuda/portable/config.h"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/smem_tile.cuh"

namespace online_attention::cuda::portable {

template <typename Element, ForwardConfig kConfig>
struct WarpTile {
  static constexpr int kAtoms = kConfig.row_atoms;
  static constexpr int kKeyTiles = kConfig.tile_n / 8;    // n8 tiles of scores
  static constexpr int kDimTiles = kConfig.head_dim / 8;  // n8 tiles of outputs
  static constexpr int kDimSteps = kConfig.head_dim / 16;
  static constexpr int kKeySteps = kConfig.tile_n / 16;
  static constexpr int kRows = 2 * kAtoms;  // per thread
  using Tile = SmemTile<kConfig.head_dim>;

  float scores[kAtoms][kKeyTiles][4];
  float out[kAtoms][kDimTiles][4] = {};
  SoftmaxRow<float> softmax[kRows];
  uint32_t q[kConfig.q_in_registers ? kAtoms : 1][kConfig.q_in_registers ? kDimSteps : 1][4];

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32u); }
  __device__ __forceinline__ static int warp_row() {
    return static_cast<int>(threadIdx.x / 32u * (16 * kAtoms));
  }
  // Row of the block's tile that register row r of this thread is.
  __device__ __forceinline__ static int row(int r) {
    return warp_row() + r / 2 * 16 + r % 2 * 8 + static_cast<int>(threadIdx.x % 32u / 4u);
  }

  // Where this lane's row of the first fragment lies in a Q, K or V tile. Q: rows are queries, a
  // fragment is 16 rows by 16 columns. K: 16 keys by 16 columns, two n8 tiles. V: 16 keys by 16
  // columns, transposed on loading, two n8 tiles.
  __device__ __forceinline__ static uint32_t q_base(uint32_t q_smem) {
    const unsigned lane = threadIdx.x % 32u;
    return q_smem + Tile::offset(warp_row() + lane % 16, lane / 16);
  }
  __device__ __forceinline__ static uint32_t k_base(uint32_t k_smem) {
    const unsigned lane = threadIdx.x % 32u;
    return k_smem + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  __device__ __forceinline__ static uint32_t v_base(uint32_t v_smem) {
    const unsigned lane = threadIdx.x % 32u;
    return v_smem + Tile::offset(lane % 16, lane / 16);
  }

  __device__ __forceinline__ void keep_q(uint32_t q_smem) {
    if constexpr (kConfig.q_in_registers) {
#pragma unroll
      for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
        for (int step = 0; step < kDimSteps; ++step) {
          ptx::ldmatrix_x4(q[atom][step],
                           Tile::advance(q_base(q_smem), 2 * step) + atom * 16 * Tile::kRowBytes);
        }
      }
    }
  }

  __device__ __forceinline__ void clear_scores() {
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[atom][n][c] = 0;
      }
    }
  }

  // scores += Q K^T
  __device__ __forceinline__ void multiply_qk(uint32_t q_base, uint32_t k_base) {
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      uint32_t a[kAtoms][4];
#pragma unroll
      for (int atom = 0; atom < kAtoms; ++atom) {
        if constexpr (kConfig.q_in_registers) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[atom][i] = q[atom][step][i];
        } else {
          ptx::ldmatrix_x4(a[atom], Tile::advance(q_base, 2 * step) + atom * 16 * Tile::kRowBytes);
        }
      }
#pragma unroll
      for (int pair = 0; pair < kKeySteps; ++pair) {  // two n8 tiles at a time
        uint32_t b[4];
        ptx::ldmatrix_x4(b, Tile::advance(k_base, 2 * step) + pair * 16 * Tile::kRowBytes);
#pragma unroll
        for (int atom = 0; atom < kAtoms; ++atom) {
          ptx::mma_m16n8k16(scores[atom][2 * pair], a[atom], b[0], b[1], Element());
          ptx::mma_m16n8k16(scores[atom][2 * pair + 1], a[atom], b[2], b[3], Element());
        }
      }
    }
  }

  __device__ __forceinline__ void scale_scores(float factor) {
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          scores[atom][n][c] = rounded_product(scores[atom][n][c], factor);
      }
    }
  }

  // Hides what the mask hides: those scores become -inf, whatever they were. `query(r)` is the
  // query index of register row r.
  template <typename Query>
  __device__ __forceinline__ void hide(const Mask& mask, const Query& query, int32_t kv_begin) {
    const int32_t kv_lane = kv_begin + lane() % 4 * 2;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t q_idx = query(r);
      const KvRange seen = mask.kv_range(q_idx, q_idx + 1);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int32_t kv_idx = kv_lane + 8 * n + j;
          float& score = scores[r / 2][n][r % 2 * 2 + j];
          score = kv_idx >= seen.begin && kv_idx < seen.end ? score : -kInfinity<float>;
        }
      }
    }
  }

  // Brings the scores to base-2 units and adds the bias. `row(r)` tells where the elements of
  // register row r's query begin. Keys from s_kv on are not read: `hide` comes next and hides them.
  template <typename Row>
  __device__ __forceinline__ void add_bias(const Bias& bias, const Row& row, bool in_pairs,
                                           int32_t kv_begin, int32_t s_kv, float scale_log2) {
    const int32_t kv_lane = kv_begin + lane() % 4 * 2;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t first = row(r) + kv_lane * bias.stride_kv;
      float added[kKeyTiles][2];
      with_bias_type<Element>(bias, [&](auto type) {
        BiasPair<decltype(type)> pairs[kKeyTiles];
        read_bias(pairs, bias, first, in_pairs, s_kv - kv_lane);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) added[n][j] = bias_of<float>(pairs[n][j]);
        }
      });
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[r / 2][n][r % 2 * 2 + j];
          score = biased(rounded_product(score, scale_log2), added[n][j]);
        }
      }
    }
  }
  // Of one row, from index `first` on. `keys`: how many keys there are from this lane's first on.
  template <typename Type>
  __device__ __forceinline__ static void read_bias(BiasPair<Type> (&pairs)[kKeyTiles],
                                                   const Bias& bias, int64_t first, bool in_pairs,
                                                   int32_t keys) {
    const Type* from = static_cast<const Type*>(bias.data) + first;
    if (in_pairs) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        if (8 * n < keys) pairs[n].read(from + 8 * n);
      }
      return;
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      if (8 * n < keys) pairs[n].read_one(0, from);
      if (8 * n + 1 < keys) pairs[n].read_one(1, from + bias.stride_kv);
      from += 8 * bias.stride_kv;
    }
  }

  // Drops weights, after their sums have been absorbed. Of the tile's keys, eight of a row that one
  // call of the generator serves are this lane's, in four neighbouring n8 tiles. `query(r)` tells
  // the head, among the B * H, and the index of register row r's query.
  template <typename Query>
  __device__ __forceinline__ void drop(const Dropout& dropout, const Query& query,
                                       int32_t kv_begin) {
    constexpr int kGroupTiles = Dropout::kKeysOfGroup / 8;
    static_assert(kKeyTiles % kGroupTiles == 0);
    const int32_t first_call = Dropout::call_of(kv_begin + lane() % 4 * 2);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto [head, q_idx] = query(r);
#pragma unroll
      for (int group = 0; group < kKeyTiles / kGroupTiles; ++group) {
        const int32_t call = first_call + group * (Dropout::kKeysOfGroup / Dropout::kKeysOfCall);
        const Philox4x32 bits = dropout.bits(head, q_idx, call);
#pragma unroll
        for (int e = 0; e < Dropout::kKeysOfCall; ++e) {
          float& weight = scores[r / 2][group * kGroupTiles + e / 2][r % 2 * 2 + e % 2];
          weight = dropout.keeps(bits, e) ? weight : 0;
        }
      }
    }
  }

  __device__ __forceinline__ void scale_outputs(float factor) {
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[atom][d][c] *= factor;
      }
    }
  }

  // Rows' maxima follow the scores in steps of at least 2^8, after which sums and outputs must be
  // rescaled: rarely after the first key tiles. Weights then reach 2^8 at most, which fp16 holds.
  static constexpr float kSlack = 8;

  // (E6)-(E8): raises the rows' maxima by this tile, brings the outputs to the new maximum, turns
  // scores into probabilities and absorbs their sums. A row's sum stays spread over its quad.
  __device__ __forceinline__ void update_softmax(float scale_log2) {
    float alpha[kRows];
    bool rescale = false, huge = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float tile_max = -kInfinity<float>;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) tile_max = max_of(tile_max, scores[r / 2][n][r % 2 * 2 + j]);
      }
      alpha[r] = softmax[r].raise_lazily(quad_max(tile_max) * scale_log2, kSlack);
      rescale |= alpha[r] != 1;
      huge |= fabsf(softmax[r].base()) > kFusedUpTo<float>;
    }
    float factor = scale_log2;
    if (__any_sync(0xffffffffu, rescale || huge)) {
      rescale_rows(alpha);
      if (__any_sync(0xffffffffu, huge)) {
        scale_scores(scale_log2);
        factor = 1;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float tile_sum = 0;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[r / 2][n][r % 2 * 2 + j];
          score = softmax[r].weight(score * factor);
          tile_sum += score;
        }
      }
      softmax[r].absorb(1, tile_sum);  // rescaled above, where it was needed
    }
  }

  __device__ __forceinline__ void rescale_rows(const float (&alpha)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      softmax[r].absorb(alpha[r], 0);
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
        for (int j = 0; j < 2; ++j) out[r / 2][d][r % 2 * 2 + j] *= alpha[r];
      }
    }
  }

  // out += P V, with P the probabilities in `scores`, rounded to Element.
  __device__ __forceinline__ void multiply_pv(uint32_t v_base) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      uint32_t p[kAtoms][4];
#pragma unroll
      for (int atom = 0; atom < kAtoms; ++atom) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&tile)[4] = scores[atom][2 * step + i / 2];
          p[atom][i] = pack_pair<Element>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int pair = 0; pair < kDimTiles / 2; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Tile::advance(v_base, 2 * pair) + step * 16 * Tile::kRowBytes);
#pragma unroll
        for (int atom = 0; atom < kAtoms; ++atom) {
          ptx::mma_m16n8k16(out[atom][2 * pair], p[atom], b[0], b[1], Element());
          ptx::mma_m16n8k16(out[atom][2 * pair + 1], p[atom], b[2], b[3], Element());
        }
      }
    }
  }

  // Adds the Inf and NaN elements of a value tile, which multiply_pv has seen as zeros, to the rows
  // that see their keys. Exact weights are positive, so the sum is what the weighted one would be.
  // `sees(r, kv_idx)`: whether register row r does.
  template <typename Sees>
  __device__ __forceinline__ void add_nonfinite(const Sees& sees, const RowSource<Element>& v,
                                                int32_t kv_begin, int32_t kv_end) {
#pragma unroll 1
    for (int32_t kv_idx = kv_begin; kv_idx < kv_end; ++kv_idx) {
      const Element* v_row = v.row(kv_idx) + lane() % 4 * 2;
      const int length = v.length - lane() % 4 * 2;
      bool visible[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) visible[r] = sees(r, kv_idx);
#pragma unroll
      for (int i = 0; i < kDimTiles * 2; ++i) {
        const int column = i / 2 * 8 + i % 2;
        if (column >= length) continue;
        const float x = static_cast<float>(v_row[column]);
        const float nonfinite = isfinite(x) ? 0.0f : x;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          out[r / 2][i / 2][r % 2 * 2 + i % 2] += visible[r] ? nonfinite : 0.0f;
        }
      }
    }
  }

  // Adds up the parts of the row sums that the lanes of a quad hold.
  __device__ __forceinline__ void complete_sums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) softmax[r].l = quad_sum(softmax[r].l);
  }

  // (E9)
  __device__ __forceinline__ void normalise() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inverse_sum = softmax[r].inverse_sum();
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
        for (int j = 0; j < 2; ++j) out[r / 2][d][r % 2 * 2 + j] *= inverse_sum;
      }
    }
  }
};

}  // namespace online_attention::cuda::portable
