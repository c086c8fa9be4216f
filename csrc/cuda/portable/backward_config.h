// SPDX-License-Identifier: BSD-3-Clause
// The tile shapes of the portable tensor-core backward, for each head-dim bucket and each size of
// shared memory.
#pragma once

#include "core/hd.h"

namespace online_attention::cuda::portable {

struct BackwardConfig {
  int head_dim;      // D and D_v are padded up to this inside the kernel
  int tile_m;        // queries of a step
  int tile_n;        // keys of a block
  int warps;         // tile_n / 32 rows of warps by column_warps()
  int stages;        // buffers for Q and dO: with two, the next tile is on its way during a step
  int dq_row_atoms;  // 16-query mma tiles of one warp in dQ = dS K

  ONLINE_ATTENTION_HD constexpr int threads() const { return 32 * warps; }
  // A warp owns 32 keys. The warps that share them divide the queries of a step between them in the
  // first two products and the head dim in dV and dK.
  ONLINE_ATTENTION_HD constexpr int key_warps() const { return tile_n / 32; }
  ONLINE_ATTENTION_HD constexpr int column_warps() const { return warps / key_warps(); }
  ONLINE_ATTENTION_HD constexpr int queries_per_warp() const { return tile_m / column_warps(); }
  ONLINE_ATTENTION_HD constexpr int dq_row_warps() const { return tile_m / (16 * dq_row_atoms); }
  ONLINE_ATTENTION_HD constexpr int dq_column_warps() const { return warps / dq_row_warps(); }

  // Bytes of shared memory: K and V; Q and dO, each `stages` times; P; dS twice; lse and delta of
  // the queries, twice; one mark for each key; the block's place.
  ONLINE_ATTENTION_HD constexpr int kv_tile_bytes() const { return tile_n * head_dim * 2; }
  ONLINE_ATTENTION_HD constexpr int q_tile_bytes() const { return tile_m * head_dim * 2; }
  ONLINE_ATTENTION_HD constexpr int pair_tile_bytes() const { return tile_n * tile_m * 2; }
  ONLINE_ATTENTION_HD constexpr int row_terms_bytes() const { return 2 * tile_m * 4; }
  ONLINE_ATTENTION_HD constexpr int smem_bytes() const {
    return 2 * kv_tile_bytes() + 2 * stages * q_tile_bytes() + 3 * pair_tile_bytes() +
           2 * row_terms_bytes() + tile_n * 4 + 56;
  }
};

// By the shared memory that one block can have: 227 KiB (sm_90, sm_100), 99 KiB (the least from
// sm_80 on) and Turing's 64 KiB.
enum class SmemClass : int8_t { large, medium, turing };
constexpr int smem_limit(SmemClass size) {
  return 1024 * (size == SmemClass::large ? 227 : size == SmemClass::medium ? 99 : 64);
}

// Registers decide at the top: dK and dV of a block take 2 * tile_n * head_dim floats, half of an
// SM's registers with 8 warps, scores and dP another quarter. Tall steps (tile_m) save reads of K
// and V from shared memory.
template <int kHeadDim, SmemClass kSize>
inline constexpr BackwardConfig kBackward{};
template <>
inline constexpr BackwardConfig kBackward<64, SmemClass::large>{64, 128, 128, 8, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<96, SmemClass::large>{96, 64, 128, 8, 2, 1};
template <>
inline constexpr BackwardConfig kBackward<128, SmemClass::large>{128, 64, 128, 8, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<192, SmemClass::large>{192, 64, 64, 8, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<256, SmemClass::large>{256, 64, 64, 8, 2, 2};

template <>
inline constexpr BackwardConfig kBackward<64, SmemClass::medium>{64, 64, 64, 4, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<96, SmemClass::medium>{96, 64, 64, 4, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<128, SmemClass::medium>{128, 32, 64, 4, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<192, SmemClass::medium>{192, 32, 32, 4, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<256, SmemClass::medium>{256, 32, 32, 4, 1, 2};

template <>
inline constexpr BackwardConfig kBackward<64, SmemClass::turing>{64, 32, 64, 4, 2, 2};
template <>
inline constexpr BackwardConfig kBackward<96, SmemClass::turing>{96, 32, 64, 4, 2, 1};
template <>
inline constexpr BackwardConfig kBackward<128, SmemClass::turing>{128, 32, 64, 4, 1, 2};
template <>
inline constexpr BackwardConfig kBackward<192, SmemClass::turing>{192, 32, 32, 4, 1, 2};
// Head dims above 192 do not fit: the SIMT kernel computes them on Turing.

template <SmemClass kSize, int... kHeadDims>
constexpr bool backward_fits() {
  return ((kBackward<kHeadDims, kSize>.smem_bytes() <= smem_limit(kSize)) && ...);
}
static_assert(backward_fits<SmemClass::large, 64, 96, 128, 192, 256>());
static_assert(backward_fits<SmemClass::medium, 64, 96, 128, 192, 256>());
static_assert(backward_fits<SmemClass::turing, 64, 96, 128, 192>());

}  // namespace online_attention::cuda::portable
