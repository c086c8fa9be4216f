// SPDX-License-Identifier: BSD-3-Clause
// The tile shapes of the Hopper backward kernel and its map of shared memory.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace online_attention::cuda::hopper {

// What a block works on: tile_n keys of one key and value head.
struct KeyTile {
  int32_t b, h_kv;
  int32_t kv_begin;
  int32_t q_tile_begin, q_tile_end;  // the query tiles that see some of its keys
  int32_t q_tile_first;              // the one to begin with
  int32_t plain_begin, plain_end;    // the queries that see all of them
  int32_t steps;  // query tiles, of all heads of the group; -1: there is no further key tile
  uint32_t end;   // of its steps, counted over all key tiles of the block
};

// A step of a block: a query tile of one head.
struct QueryStep {
  int32_t h, q_tile;
};

// One as the consumers find it.
struct LoadedStep : QueryStep {
  // In masked calls, whether the mask hides some of its pairs, 0 or 1; that of the key tile's next
  // step, or -1: there is none.
  int32_t cut, next;
};

// A step's addition to dQ: which query tile, and how many key tiles add to it before and after.
struct DqTask {
  uint32_t index;  // among the query tiles of all heads
  int32_t place;   // among those that add; -1: whoever comes first
  int32_t last;    // the place that finishes dQ, if any has it; -1: there is no further step
  int32_t b, h, q_begin;
};

// Named barriers (ids of ptx::barrier_sync).
inline constexpr int kConsumersBarrier = 1;
inline constexpr int kStepBarrier = 2;  // and the next: a group's turn

inline constexpr int kGradientBoxRows = 16;  // of a box of dK or dV: a warp's rows
inline constexpr int kDqColumns = 16;        // of dQ, a warp's

struct BackwardConfig {
  int head_dim = 0;     // D and D_v are padded up to this inside the kernel
  int tile_m = 0;       // queries of a step
  bool masked = false;  // whether the call may have a mask besides the lengths
  // V lies in registers, from where it is multiplied; costs head_dim / 4 of them.
  bool held_values = false;
  // dQ is computed before dV and dK, not between them: it is handed on beside them, for which more
  // registers are needed.
  bool dq_first = false;

  static constexpr int kGroups = 2;  // warpgroups that compute, of 64 keys each
  static constexpr int kTileN = 64 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kStages = 2;    // query tiles in shared memory, of Q, dO and dS alike
  static constexpr int kColumns = 64;  // of a box: 128 bytes, what a swizzled row holds
  static constexpr int kRowBytes = 128;
  static constexpr int kSmemBytes = 227 * 1024;  // what a block may have
  // Registers of a thread after the warpgroups have settled.
  ONLINE_ATTENTION_HD constexpr int consumer_registers() const { return boxes() == 1 ? 232 : 240; }
  ONLINE_ATTENTION_HD constexpr int producer_registers() const { return boxes() == 1 ? 40 : 24; }

  ONLINE_ATTENTION_HD constexpr int boxes() const { return ceil_div(head_dim, kColumns); }
  // A warpgroup computes dQ^T for 64 columns and this many queries: all of them, or its half where
  // the head has only 64 columns.
  ONLINE_ATTENTION_HD constexpr int dq_queries() const {
    return boxes() == 1 ? tile_m / kGroups : tile_m;
  }
  // fp32 sums of dQ for one query tile.
  ONLINE_ATTENTION_HD constexpr int dq_floats() const { return tile_m * boxes() * kColumns; }

  // Bytes of a tile.
  ONLINE_ATTENTION_HD constexpr int kv_bytes() const { return boxes() * kTileN * kRowBytes; }
  ONLINE_ATTENTION_HD constexpr int q_box_bytes() const { return tile_m * kRowBytes; }
  ONLINE_ATTENTION_HD constexpr int q_bytes() const { return boxes() * q_box_bytes(); }
  ONLINE_ATTENTION_HD constexpr int ds_bytes() const { return kGroups * q_box_bytes(); }
  // What a warp adds to dQ in a step.
  ONLINE_ATTENTION_HD constexpr int dq_warp_bytes() const { return dq_queries() * 16 * 4; }
  // The warps of a group that have columns of dQ, and what they add.
  ONLINE_ATTENTION_HD constexpr int dq_warps(int group) const {
    const int columns = boxes() == 1 ? head_dim : head_dim - group * kColumns;
    return columns < kColumns ? columns / kDqColumns : kColumns / kDqColumns;
  }
  ONLINE_ATTENTION_HD constexpr int dq_group_bytes(int group) const {
    return dq_warps(group) * dq_warp_bytes();
  }
  // A warp's share of all dS.
  ONLINE_ATTENTION_HD constexpr int ds_warp_bytes() const {
    return kStages * ds_bytes() / (4 * kGroups);
  }
  ONLINE_ATTENTION_HD constexpr int terms_bytes() const { return tile_m * 4; }

  // Bytes of the sums of dQ that are finished here, of a query tile: masked calls do that.
  ONLINE_ATTENTION_HD constexpr int sums_bytes() const {
    return masked ? 4 * kGroups * dq_warp_bytes() : 0;
  }

  // Offsets: K, V, Q, dO, dS, dQ, the sums of dQ, the terms of the query rows (lse, delta), marks
  // of the keys, barriers of 8 bytes each, KeyTiles, DqTasks, LoadedSteps.
  ONLINE_ATTENTION_HD constexpr int v_offset() const { return kv_bytes(); }
  ONLINE_ATTENTION_HD constexpr int q_offset() const { return 2 * kv_bytes(); }
  ONLINE_ATTENTION_HD constexpr int dout_offset() const { return q_offset() + kStages * q_bytes(); }
  ONLINE_ATTENTION_HD constexpr int ds_offset() const {
    return dout_offset() + kStages * q_bytes();
  }
  ONLINE_ATTENTION_HD constexpr int dq_offset() const { return ds_offset() + kStages * ds_bytes(); }
  ONLINE_ATTENTION_HD constexpr int sums_offset() const {
    return dq_offset() + 4 * kGroups * dq_warp_bytes();
  }
  ONLINE_ATTENTION_HD constexpr int terms_offset() const { return sums_offset() + sums_bytes(); }
  ONLINE_ATTENTION_HD constexpr int marks_offset() const {
    return terms_offset() + 2 * kStages * terms_bytes();
  }
  ONLINE_ATTENTION_HD constexpr int barrier_offset() const { return marks_offset() + kTileN * 4; }
  static constexpr int kTiles = 4;  // one is stored, one computed, one on its way
  static constexpr int kTasks = 2;  // DqTasks: one is done, one is next
  static constexpr int kSteps = 4;  // LoadedSteps: one ends, one is computed, one waits for room
  static constexpr int kBarriers = 7 + 6 * kStages + 3 * kGroups + 2 * kTasks;
  ONLINE_ATTENTION_HD constexpr int tile_offset() const {
    return barrier_offset() + (kBarriers + 1) / 2 * 16;
  }
  ONLINE_ATTENTION_HD constexpr int task_offset() const {
    return tile_offset() + kTiles * static_cast<int>(sizeof(KeyTile));
  }
  ONLINE_ATTENTION_HD constexpr int step_offset() const {
    return task_offset() + kTasks * static_cast<int>(sizeof(DqTask));
  }
  ONLINE_ATTENTION_HD constexpr int smem_bytes() const {
    return step_offset() + kSteps * static_cast<int>(sizeof(LoadedStep));
  }

  ONLINE_ATTENTION_HD constexpr bool fits() const {
    const int registers = kGroups * consumer_registers() + producer_registers();
    // dK and dV leave through the places of dS and dQ, 16 rows of each warp.
    const int rows_bytes = boxes() * 16 * kRowBytes;
    return ds_warp_bytes() >= rows_bytes && dq_warp_bytes() >= rows_bytes &&
           ds_warp_bytes() % 1024 == 0 && dq_warp_bytes() % 1024 == 0 &&
           smem_bytes() <= kSmemBytes && tile_m % 16 == 0 && head_dim % 16 == 0 &&
           dq_queries() % 16 == 0 && boxes() <= kGroups && registers * 128 <= 65536;
  }

  // Where the terms of the rows of a tile lie, so that a thread reads those of its columns of S^T
  // in 16-byte pieces: among 16 rows, 8e + 2t + j stands at 4t + 2e + j.
  ONLINE_ATTENTION_HD static constexpr int term_place(int row) {
    return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
  }
};

// An element of the sums of dQ of a query tile. They lie as the threads hold them: [warp of both
// groups][8 queries][lane][4].
struct DqPlace {
  int query, column;
};
ONLINE_ATTENTION_HD constexpr DqPlace dq_place(const BackwardConfig& config, int index) {
  const int e = index % 4, lane = index / 4 % 32, rest = index / 128;
  const int n = rest % (config.dq_queries() / 8), warp = rest / (config.dq_queries() / 8);
  const int group = warp / 4;
  const int query = 8 * n + lane % 4 * 2 + e % 2, column = 16 * (warp % 4) + lane / 4 + e / 2 * 8;
  return config.boxes() == 1 ? DqPlace{query + group * config.dq_queries(), column}
                             : DqPlace{query, column + 64 * group};
}

// Rows of kBackward, for calls without and with a mask: what was measured against them stands in
// docs/hopper_backward.md.
template <int kHeadDim, bool kMasked>
inline constexpr BackwardConfig kBackward = {};
template <>
inline constexpr BackwardConfig kBackward<64, false> = {
    .head_dim = 64, .tile_m = 128, .dq_first = true};
template <>
inline constexpr BackwardConfig kBackward<64, true> = {
    .head_dim = 64, .tile_m = 128, .masked = true};
template <>
inline constexpr BackwardConfig kBackward<96, false> = {.head_dim = 96, .tile_m = 80};
template <>
inline constexpr BackwardConfig kBackward<96, true> = {
    .head_dim = 96, .tile_m = 64, .masked = true, .held_values = true, .dq_first = true};
template <>
inline constexpr BackwardConfig kBackward<128, false> = {.head_dim = 128, .tile_m = 80};
template <>
inline constexpr BackwardConfig kBackward<128, true> = {
    .head_dim = 128, .tile_m = 64, .masked = true, .dq_first = true};
inline constexpr int64_t kBackwardHeadDimMax = 128;

}  // namespace online_attention::cuda::hopper
