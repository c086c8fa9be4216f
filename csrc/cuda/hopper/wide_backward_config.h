// SPDX-License-Identifier: BSD-3-Clause
// The tile shapes of the Hopper backward kernel for wide heads and its map of shared memory.
#pragma once

#include "cuda/hopper/backward_config.h"

namespace online_attention::cuda::hopper {

struct WideBackwardConfig {
  int head_dim = 0, value_dim = 0;  // D and D_v are padded up to these inside the kernel
  int stages = 0;                   // query tiles in shared memory, of Q and dO alike
  bool masked = false;              // whether the call may have a mask besides the lengths
  int pair_stages = 1;              // tiles of P or dS in shared memory, of either block
  // Registers of a thread after the warpgroups have settled: of those that hold dV, hold dK and
  // compute dQ.
  int dv_registers = 208, dk_registers = 208, dq_registers = 72;
  // Whether dV, dK of a step run on into the next one: 16 registers more.
  bool dv_runs_on = false, dk_runs_on = true;

  static constexpr int kTileN = 64;
  static constexpr int kBlocks = 2;  // of a cluster, whose key tiles lie side by side
  static constexpr int kClusterKeys = kBlocks * kTileN;
  static constexpr int tile_m = 64;
  static constexpr int kThreads = 4 * 128;
  static constexpr int kColumns = BackwardConfig::kColumns;
  static constexpr int kRowBytes = BackwardConfig::kRowBytes;
  static constexpr int kBoxBytes = 64 * kRowBytes;  // of 64 rows, keys and queries alike
  static constexpr int kProducerRegisters = 24;

  ONLINE_ATTENTION_HD constexpr int boxes() const { return ceil_div(head_dim, kColumns); }
  ONLINE_ATTENTION_HD constexpr int value_boxes() const { return ceil_div(value_dim, kColumns); }
  // fp32 sums of dQ for one query tile.
  ONLINE_ATTENTION_HD constexpr int dq_floats() const { return tile_m * boxes() * kColumns; }
  static constexpr int kTermsBytes = tile_m * 4;
  ONLINE_ATTENTION_HD static constexpr int terms_bytes() { return kTermsBytes; }
  // P as fp16, a thread's pairs in pieces of 16 bytes; dS, a box of 64 queries.
  static constexpr int kPairBytes = 64 * tile_m * 2;
  // What a warp adds to dQ for a box of 64 columns.
  static constexpr int kDqWarpFloats = 16 * kColumns;
  // Boxes of dQ that a block computes in a step; of an odd number, the blocks take turns with the
  // one in the middle.
  static constexpr int kDqBoxes = 2;

  // Bytes of a tile: keys or queries; values or dO.
  ONLINE_ATTENTION_HD constexpr int q_bytes() const { return boxes() * kBoxBytes; }
  ONLINE_ATTENTION_HD constexpr int dout_bytes() const { return value_boxes() * kBoxBytes; }

  // Offsets: K, V, keys of the other block, Q, dO, P or dS, dS of the other block, the terms of the
  // query rows (lse, delta), marks of the keys, barriers of 8 bytes each, the KeyTile.
  ONLINE_ATTENTION_HD constexpr int v_offset() const { return q_bytes(); }
  ONLINE_ATTENTION_HD constexpr int other_k_offset() const { return v_offset() + dout_bytes(); }
  ONLINE_ATTENTION_HD constexpr int q_offset() const {
    return other_k_offset() + kDqBoxes * kBoxBytes;
  }
  ONLINE_ATTENTION_HD constexpr int dout_offset() const { return q_offset() + stages * q_bytes(); }
  ONLINE_ATTENTION_HD constexpr int pairs_offset() const {
    return dout_offset() + stages * dout_bytes();
  }
  ONLINE_ATTENTION_HD constexpr int other_ds_offset() const {
    return pairs_offset() + pair_stages * kPairBytes;
  }
  ONLINE_ATTENTION_HD constexpr int terms_offset() const {
    return other_ds_offset() + pair_stages * kPairBytes;
  }
  ONLINE_ATTENTION_HD constexpr int marks_offset() const {
    return terms_offset() + 2 * stages * kTermsBytes;
  }
  ONLINE_ATTENTION_HD constexpr int barrier_offset() const { return marks_offset() + kTileN * 4; }
  ONLINE_ATTENTION_HD constexpr int barriers() const { return 4 + 4 * stages + 7 * pair_stages; }
  ONLINE_ATTENTION_HD constexpr int tile_offset() const {
    return barrier_offset() + ceil_div(barriers() * 8, 16) * 16;
  }
  ONLINE_ATTENTION_HD constexpr int smem_bytes() const {
    return tile_offset() + static_cast<int>(sizeof(KeyTile));
  }

  ONLINE_ATTENTION_HD constexpr bool fits() const {
    const int registers = dv_registers + dk_registers + dq_registers + kProducerRegisters;
    return smem_bytes() <= BackwardConfig::kSmemBytes && head_dim % 64 == 0 &&
           value_dim % 64 == 0 && registers * 128 <= 65536;
  }
  // For what depends on the tile of queries and keys alone.
  ONLINE_ATTENTION_HD constexpr BackwardConfig tile(int columns) const {
    return {.head_dim = columns, .tile_m = tile_m, .masked = masked};
  }
};

// An element of the sums of dQ of a query tile. They lie as the threads hold them: [warp][box of 64
// columns][8 columns][lane][4].
ONLINE_ATTENTION_HD constexpr DqPlace dq_place(const WideBackwardConfig& config, int index) {
  const int e = index % 4, lane = index / 4 % 32, n = index / 128 % 8, rest = index / 1024;
  const int box = rest % config.boxes(), warp = rest / config.boxes();
  return {16 * warp + lane / 4 + e / 2 * 8, 64 * box + 8 * n + lane % 4 * 2 + e % 2};
}

// Rows of kWideBackward, by D and D_v, for calls without and with a mask: what was measured against
// them stands in docs/hopper_backward.md.
template <int kHeadDim, int kValueDim, bool kMasked>
inline constexpr WideBackwardConfig kWideBackward = {};
template <>
inline constexpr WideBackwardConfig kWideBackward<192, 128, false> = {.head_dim = 192,
                                                                      .value_dim = 128,
                                                                      .stages = 2,
                                                                      .pair_stages = 3,
                                                                      .dv_registers = 144,
                                                                      .dk_registers = 176,
                                                                      .dq_registers = 96,
                                                                      .dv_runs_on = true};
template <>
inline constexpr WideBackwardConfig kWideBackward<192, 128, true> = {.head_dim = 192,
                                                                     .value_dim = 128,
                                                                     .stages = 2,
                                                                     .masked = true,
                                                                     .pair_stages = 3,
                                                                     .dv_registers = 144,
                                                                     .dk_registers = 176,
                                                                     .dq_registers = 96};
template <>
inline constexpr WideBackwardConfig kWideBackward<192, 192, false> = {.head_dim = 192,
                                                                      .value_dim = 192,
                                                                      .stages = 2,
                                                                      .pair_stages = 2,
                                                                      .dv_registers = 176,
                                                                      .dk_registers = 176,
                                                                      .dq_registers = 96,
                                                                      .dv_runs_on = true};
template <>
inline constexpr WideBackwardConfig kWideBackward<192, 192, true> = {.head_dim = 192,
                                                                     .value_dim = 192,
                                                                     .stages = 2,
                                                                     .masked = true,
                                                                     .pair_stages = 2,
                                                                     .dv_registers = 176,
                                                                     .dk_registers = 176,
                                                                     .dq_registers = 96};
template <>
inline constexpr WideBackwardConfig kWideBackward<256, 256, false> = {.head_dim = 256,
                                                                      .value_dim = 256,
                                                                      .stages = 2,
                                                                      .pair_stages = 1,
                                                                      .dv_registers = 192,
                                                                      .dk_registers = 192,
                                                                      .dq_registers = 96,
                                                                      .dk_runs_on = false};
template <>
inline constexpr WideBackwardConfig kWideBackward<256, 256, true> = {.head_dim = 256,
                                                                     .value_dim = 256,
                                                                     .stages = 2,
                                                                     .masked = true,
                                                                     .pair_stages = 1,
                                                                     .dv_registers = 192,
                                                                     .dk_registers = 192,
                                                                     .dq_registers = 96,
                                                                     .dk_runs_on = false};
inline constexpr int64_t kWideBackwardHeadDimMax = 256;

}  // namespace online_attention::cuda::hopper
