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

// Measured in lab/01_portable_tile_shapes. Registers per thread decide: scores take 4 * row_atoms *
// tile_n / 8, outputs 4 * row_atoms * head_dim / 8, and two blocks of four warps on one SM leave
// 255 for each thread. Two row atoms halve the shared-memory reads per product; they fit up to head
// dim 128.
template <int kHeadDim>
inline constexpr ForwardConfig kAmpere{};
template <>
inline constexpr ForwardConfig kAmpere<64>{.head_dim = 64,
                                           .row_atoms = 2,
                                           .warps = 4,
                                           .tile_n = 128,
                                           .blocks_per_sm = 2,
                                           .q_in_registers = false};
template <>
inline constexpr ForwardConfig kAmpere<96>{.head_dim = 96,
                                           .row_atoms = 2,
                                           .warps = 4,
                                           .tile_n = 64,
                                           .blocks_per_sm = 2,
                                           .q_in_registers = false};
template <>
inline constexpr ForwardConfig kAmpere<128>{.head_dim = 128,
                                            .row_atoms = 2,
                                            .warps = 4,
                                            .tile_n = 64,
                                            .blocks_per_sm = 2,
                                            .q_in_registers = false};
template <>
inline constexpr ForwardConfig kAmpere<192>{.head_dim = 192,
                                            .row_atoms = 1,
                                            .warps = 4,
                                            .tile_n = 64,
                                            .blocks_per_sm = 2,
                                            .q_in_registers = false};
template <>
inline constexpr ForwardConfig kAmpere<256>{.head_dim = 256,
                                            .row_atoms = 1,
                                            .warps = 4,
                                            .tile_n = 64,
                                            .blocks_per_sm = 2,
                                            .q_in_registers = false};

// Turing has 64 KiB of shared memory for a block.
template <int kHeadDim>
inline constexpr ForwardConfig kTuring{};
template <>
inline constexpr ForwardConfig kTuring<64>{.head_dim = 64,
                                           .row_atoms = 2,
                                           .warps = 4,
                                           .tile_n = 64,
                                           .blocks_per_sm = 1,
                                           .q_in_registers = true};
template <>
inline constexpr ForwardConfig kTuring<96>{.head_dim = 96,
                                           .row_atoms = 2,
                                           .warps = 4,
                                           .tile_n = 32,
                                           .blocks_per_sm = 1,
                                           .q_in_registers = false};
template <>
inline constexpr ForwardConfig kTuring<128>{.head_dim = 128,
                                            .row_atoms = 2,
                                            .warps = 4,
                                            .tile_n = 32,
                                            .blocks_per_sm = 1,
                                            .q_in_registers = false};
template <>
inline constexpr ForwardConfig kTuring<192>{.head_dim = 192,
                                            .row_atoms = 1,
                                            .warps = 4,
                                            .tile_n = 32,
                                            .blocks_per_sm = 1,
                                            .q_in_registers = false};
template <>
inline constexpr ForwardConfig kTuring<256>{.head_dim = 256,
                                            .row_atoms = 1,
                                            .warps = 4,
                                            .tile_n = 32,
                                            .blocks_per_sm = 1,
                                            .q_in_registers = false};

// Of a call with a bias or dropout, which need registers too: no more than 64 keys.
ONLINE_ATTENTION_HD constexpr ForwardConfig modified(ForwardConfig config) {
  if (config.tile_n > 64) config.tile_n = 64;
  return config;
}

template <int kHeadDim, bool kForTuring, bool kModified>
ONLINE_ATTENTION_HD constexpr ForwardConfig config_of() {
  constexpr ForwardConfig kPlain = kForTuring ? kTuring<kHeadDim> : kAmpere<kHeadDim>;
  return kModified ? modified(kPlain) : kPlain;
}

// The most that one block can have on sm_75, and on sm_86 and sm_89, the smallest from sm_80 on.
inline constexpr int kTuringSmemBytes = 64 * 1024;
inline constexpr int kAmpereSmemBytes = 99 * 1024;
template <int... kHeadDims>
constexpr bool fits() {
  return ((kTuring<kHeadDims>.smem_bytes() <= kTuringSmemBytes) && ...) &&
         ((kAmpere<kHeadDims>.smem_bytes() <= kAmpereSmemBytes) && ...);
}
static_assert(fits<64, 96, 128, 192, 256>());

}  // namespace online_attention::cuda::portable
