// SPDX-License-Identifier: BSD-3-Clause
// The tile shapes of the Hopper kernel and its map of shared memory.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace online_attention::cuda::hopper {

// What the producer tells the consumers of a query tile.
struct Tile {
  int32_t b, h;                    // h: of the first head, where several are packed
  int32_t row_begin;               // the first row (TilePlan); -1: there is no further tile
  int32_t kv_begin, kv_blocks;     // its key tiles, of tile_n keys from kv_begin on
  int32_t plain_begin, plain_end;  // the keys that every row of the tile sees
  int32_t split;                   // of the keys; kv_blocks may be 0 where there are several
};

// Named barriers (ids of ptx::barrier_sync); 0 is the block's.
inline constexpr int kInspectorBarrier = 1;
inline constexpr int kTurnBarrier = 2;  // and those that follow: a consumer's turn

inline constexpr int kQBoxRows = 64;  // of a box of Q: a warpgroup's rows

struct ForwardConfig {
  int head_dim = 0;    // D is padded up to this inside the kernel
  int value_dim = 0;   // D_v likewise
  int tile_n = 0;      // keys of a tile
  int consumers = 0;   // warpgroups that compute, of 64 query rows each
  int stages = 0;      // tiles of keys, and as many of values, in shared memory
  int q_stages = 0;    // query tiles there: one is computed, another may be on its way
  bool turns = false;  // the consumers start their products in turns
  // Of a query tile's first key tile, which the mask may cut, these keys are taken alone where the
  // warpgroup's rows see no others; 0: never.
  int first_keys = 0;

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
  // A Tile is read until its outputs are stored: while the last S of the next query tile, if that
  // has but one key tile, gives room to the one q_stages behind it.
  ONLINE_ATTENTION_HD constexpr int tile_stages() const { return q_stages + 2; }
  // Whether the last product of a query tile runs beside the first of the next.
  ONLINE_ATTENTION_HD constexpr bool chained() const { return q_stages > 1; }
  ONLINE_ATTENTION_HD constexpr int barriers() const { return 2 * q_stages + 5 * stages; }
  ONLINE_ATTENTION_HD constexpr int tile_offset() const {
    return barrier_offset() + ceil_div(barriers() * 8, 64) * 64;
  }
  ONLINE_ATTENTION_HD constexpr int flag_offset() const {
    return tile_offset() + tile_stages() * static_cast<int>(sizeof(Tile));
  }
  ONLINE_ATTENTION_HD constexpr int smem_bytes() const { return flag_offset() + stages * 4; }

  // Registers of a thread after the warpgroups have settled; 64 K in all.
  ONLINE_ATTENTION_HD constexpr int consumer_registers() const {
    return consumers == 3 ? 160 : 232;
  }
  ONLINE_ATTENTION_HD constexpr int producer_registers() const { return consumers == 3 ? 32 : 40; }

  ONLINE_ATTENTION_HD constexpr bool fits() const {
    const int registers = consumers * consumer_registers() + producer_registers();
    // A chained consumer leaves out key tiles while the values before them are still to be used.
    const bool rings = !chained() || ceil_div(tile_m() - 64, tile_n) < stages;
    // A product takes 16 keys at a time. Chained tiles were slower with first keys taken alone.
    const bool first =
        first_keys % 16 == 0 && first_keys < tile_n && (first_keys == 0 || !chained());
    return rings && first && smem_bytes() <= kSmemBytes && tile_n % 16 == 0 &&
           registers * 128 <= 65536 && (consumers == 2 || consumers == 3);
  }
};

// Which calls a row of kForward is for: any, longer ones, or ones with a mask (some of them:
// forward_dispatch.cpp).
enum class Calls { any, longer, masked };

// By head dims and calls. What was measured of them stands in docs/hopper_forward.md.
template <int kHeadDim, int kValueDim, Calls kCalls>
inline constexpr ForwardConfig kForward = {};
template <>
inline constexpr ForwardConfig kForward<64, 64, Calls::any> = {
    .head_dim = 64, .value_dim = 64, .tile_n = 128, .consumers = 2, .stages = 4, .q_stages = 2};
template <>
inline constexpr ForwardConfig kForward<64, 64, Calls::longer> = {
    .head_dim = 64, .value_dim = 64, .tile_n = 128, .consumers = 3, .stages = 4, .q_stages = 2};
template <>
inline constexpr ForwardConfig kForward<96, 96, Calls::any> = {
    .head_dim = 96, .value_dim = 96, .tile_n = 128, .consumers = 2, .stages = 2, .q_stages = 2};
template <>
inline constexpr ForwardConfig kForward<96, 96, Calls::longer> = {
    .head_dim = 96, .value_dim = 96, .tile_n = 96, .consumers = 3, .stages = 3, .q_stages = 1};
template <>
inline constexpr ForwardConfig kForward<128, 128, Calls::any> = {
    .head_dim = 128, .value_dim = 128, .tile_n = 128, .consumers = 2, .stages = 2, .q_stages = 2};
template <>
inline constexpr ForwardConfig kForward<128, 128, Calls::masked> = {.head_dim = 128,
                                                                    .value_dim = 128,
                                                                    .tile_n = 128,
                                                                    .consumers = 2,
                                                                    .stages = 2,
                                                                    .q_stages = 2,
                                                                    .turns = true};
template <>
inline constexpr ForwardConfig kForward<128, 128, Calls::longer> = {
    .head_dim = 128, .value_dim = 128, .tile_n = 80, .consumers = 3, .stages = 3, .q_stages = 2};
template <>
inline constexpr ForwardConfig kForward<192, 128, Calls::any> = {.head_dim = 192,
                                                                 .value_dim = 128,
                                                                 .tile_n = 128,
                                                                 .consumers = 2,
                                                                 .stages = 2,
                                                                 .q_stages = 1,
                                                                 .first_keys = 64};
template <>
inline constexpr ForwardConfig kForward<192, 192, Calls::any> = {
    .head_dim = 192, .value_dim = 192, .tile_n = 80, .consumers = 2, .stages = 2, .q_stages = 2};
template <>
inline constexpr ForwardConfig kForward<256, 256, Calls::any> = {
    .head_dim = 256, .value_dim = 256, .tile_n = 80, .consumers = 2, .stages = 2, .q_stages = 1};
template <>
inline constexpr ForwardConfig kForward<256, 256, Calls::masked> = {
    .head_dim = 256, .value_dim = 256, .tile_n = 64, .consumers = 2, .stages = 2, .q_stages = 1};
inline constexpr int64_t kHeadDimMax = 256;

}  // namespace online_attention::cuda::hopper
