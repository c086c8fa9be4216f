// SPDX-License-Identifier: BSD-3-Clause
// The tile shapes of the Hopper kernel and its map of shared memory.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace online_attention::cuda::hopper {

// What the producer tells the consumers of a query tile.
struct Tile {
  int32_t b, h;
  int32_t q_begin;                 // the first row; -1: there is no further tile
  int32_t kv_begin, kv_blocks;     // its key tiles, of tile_n keys from kv_begin on; one or more
  int32_t plain_begin, plain_end;  // the keys that every row of the tile sees
  int32_t reserved;
};

// Named barriers (ids of ptx::barrier_sync; 0 is the block's): whose turn it is to issue products,
// a warpgroup by itself, and the inspectors.
inline constexpr int kTurnBarrier = 1;   // + group
inline constexpr int kGroupBarrier = 4;  // + group
inline constexpr int kInspectorBarrier = 7;

inline constexpr int kQBoxRows = 64;    // of a box of Q: a warpgroup's rows
inline constexpr int kOutBoxRows = 16;  // of a box of the output: a warp's rows

struct ForwardConfig {
  int head_dim = 0;         // D is padded up to this inside the kernel
  int value_dim = 0;        // D_v likewise
  int tile_n = 0;           // keys of a tile
  int consumers = 0;        // warpgroups that compute, of 64 query rows each
  int stages = 0;           // tiles of keys, and as many of values, in shared memory
  int q_stages = 0;         // query tiles there: one is computed, one stored, one on its way
  bool take_turns = false;  // consumers issue their products one after the other

  static constexpr int kColumns = 64;            // of a box: 128 bytes, what a swizzled row holds
  static constexpr int kRowBytes = 128;          // of such a box
  static constexpr int kSmemBytes = 227 * 1024;  // what a block may have

  ONLINE_ATTENTION_HD constexpr int tile_m() const { return 64 * consumers; }
  ONLINE_ATTENTION_HD constexpr int threads() const { return 128 * (consumers + 1); }
  ONLINE_ATTENTION_HD constexpr int head_boxes() const { return ceil_div(head_dim, kColumns); }
  ONLINE_ATTENTION_HD constexpr int value_boxes() const { return ceil_div(value_dim, kColumns); }
  // Bytes of one warpgroup's rows of Q, and of one tile.
  ONLINE_ATTENTION_HD constexpr int q_rows_bytes() const { return head_boxes() * 64 * kRowBytes; }
  ONLINE_ATTENTION_HD constexpr int q_bytes() const { return consumers * q_rows_bytes(); }
  ONLINE_ATTENTION_HD constexpr int k_bytes() const { return head_boxes() * tile_n * kRowBytes; }
  ONLINE_ATTENTION_HD constexpr int v_bytes() const { return value_boxes() * tile_n * kRowBytes; }

  // Offsets: Q, K, V, then barriers of 8 bytes each, then words.
  ONLINE_ATTENTION_HD constexpr int k_offset() const { return q_stages * q_bytes(); }
  ONLINE_ATTENTION_HD constexpr int v_offset() const { return k_offset() + stages * k_bytes(); }
  ONLINE_ATTENTION_HD constexpr int barrier_offset() const {
    return v_offset() + stages * v_bytes();
  }
  ONLINE_ATTENTION_HD constexpr int barriers() const { return 2 * q_stages + 5 * stages; }
  ONLINE_ATTENTION_HD constexpr int tile_offset() const {
    return barrier_offset() + ceil_div(barriers() * 8, 64) * 64;
  }
  ONLINE_ATTENTION_HD constexpr int flag_offset() const {
    return tile_offset() + q_stages * static_cast<int>(sizeof(Tile));
  }
  ONLINE_ATTENTION_HD constexpr int smem_bytes() const { return flag_offset() + stages * 4; }

  // Registers of a thread after the warpgroups have settled; 64 K in all.
  ONLINE_ATTENTION_HD constexpr int consumer_registers() const {
    return consumers == 3 ? 160 : 232;
  }
  ONLINE_ATTENTION_HD constexpr int producer_registers() const { return consumers == 3 ? 32 : 40; }

  ONLINE_ATTENTION_HD constexpr bool fits() const {
    const int registers = consumers * consumer_registers() + producer_registers();
    // With two query tiles, one that sees a single key tile would wait for its own successor.
    return smem_bytes() <= kSmemBytes && value_boxes() <= head_boxes() && tile_n % 16 == 0 &&
           registers * 128 <= 65536 && (consumers == 2 || consumers == 3) && q_stages >= 3;
  }
};

// Rows of kForward: what was measured against them stands in docs/hopper_forward.md.
template <int kHeadDim>
inline constexpr ForwardConfig kForward = {};
template <>
inline constexpr ForwardConfig kForward<64> = {
    .head_dim = 64, .value_dim = 64, .tile_n = 128, .consumers = 3, .stages = 4, .q_stages = 3};
template <>
inline constexpr ForwardConfig kForward<96> = {
    .head_dim = 96, .value_dim = 96, .tile_n = 128, .consumers = 2, .stages = 2, .q_stages = 3};
template <>
inline constexpr ForwardConfig kForward<128> = {
    .head_dim = 128, .value_dim = 128, .tile_n = 128, .consumers = 2, .stages = 2, .q_stages = 3};
inline constexpr int64_t kHeadDimMax = 128;

}  // namespace online_attention::cuda::hopper
