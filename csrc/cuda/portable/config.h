// SPDX-License-Identifier: BSD-3-Clause
// The tile shapes of the portable tensor-core kernel, one row for each head-dim bucket.
#pragma once

#include "core/hd.h"

namespace online_attention::cuda::portable {

struct ForwardConfig {
  int head_dim;         // D and D_v are padded up to this inside the kernel
  int row_atoms;        // 16-row mma tiles of one warp
  int warps;            // each with its own query rows
  int tile_n;           // keys of a tile
  int blocks_per_sm;    // resident at once, where shared memory allows
  bool q_in_registers;  // else its fragments are read from shared memory for every key tile

  ONLINE_ATTENTION_HD constexpr int tile_m() const { return 16 * row_atoms * warps; }
  ONLINE_ATTENTION_HD constexpr int threads() const { return 32 * warps; }
  ONLINE_ATTENTION_HD constexpr int smem_bytes() const {
    return (tile_m() + 2 * tile_n) * head_dim * 2;
  }
};

// Registers per thread decide: scores take 4 * row_atoms * tile_n / 8, outputs 4 * row_atoms *
// head_dim / 8, and two blocks of four warps on one SM leave 255 for each thread. Two row atoms
// halve the shared-memory reads per product; they fit up to head dim 128.
template <int kHeadDim>
inline constexpr ForwardConfig kAmpere{};
template <>
inline constexpr ForwardConfig kAmpere<64>{64, 2, 4, 128, 2, false};
template <>
inline constexpr ForwardConfig kAmpere<96>{96, 2, 4, 64, 2, false};
template <>
inline constexpr ForwardConfig kAmpere<128>{128, 2, 4, 64, 2, false};
template <>
inline constexpr ForwardConfig kAmpere<192>{192, 1, 4, 64, 2, false};
template <>
inline constexpr ForwardConfig kAmpere<256>{256, 1, 4, 64, 2, false};

// Turing has 64 KiB of shared memory for a block.
template <int kHeadDim>
inline constexpr ForwardConfig kTuring{};
template <>
inline constexpr ForwardConfig kTuring<64>{64, 2, 4, 64, 1, true};
template <>
inline constexpr ForwardConfig kTuring<96>{96, 2, 4, 32, 1, false};
template <>
inline constexpr ForwardConfig kTuring<128>{128, 2, 4, 32, 1, false};
template <>
inline constexpr ForwardConfig kTuring<192>{192, 1, 4, 32, 1, false};
template <>
inline constexpr ForwardConfig kTuring<256>{256, 1, 4, 32, 1, false};

template <int kHeadDim, bool kForTuring>
ONLINE_ATTENTION_HD constexpr ForwardConfig config_of() {
  return kForTuring ? kTuring<kHeadDim> : kAmpere<kHeadDim>;
}

inline constexpr int kTuringSmemBytes = 64 * 1024;
static_assert(kTuring<192>.smem_bytes() <= kTuringSmemBytes);
static_assert(kTuring<128>.smem_bytes() <= kTuringSmemBytes);
static_assert(kTuring<256>.smem_bytes() <= kTuringSmemBytes);

}  // namespace online_attention::cuda::portable
