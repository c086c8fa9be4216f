// SPDX-License-Identifier: BSD-3-Clause
// A consumer warpgroup's main loop and epilogue.
#pragma once

#include "cuda/hopper/producer.cuh"
#include "cuda/hopper/warpgroup_tile.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, ForwardConfig kConfig>
struct Consumer {
  using Map = SharedMap<kConfig>;
  using Rows = WarpgroupTile<Element, kConfig>;
  static constexpr bool kTight = kConfig.value_dim > 192;  // no register to spare

  const ForwardCall& call;
  const Map& smem;
  int group;            // 0 .. consumers - 1
  uint32_t opened = 0;  // query tiles before this one
  uint32_t tiles = 0;   // key tiles whose scores are done; the values of the last are still to come
  bool k_came = false;  // whether the keys of the next one are known to be there
  Rows rows;
  typename Rows::Scores scores;
  bool nonfinite = false;  // some value of the query tile was, see inspect_values

  // The last key tile whose scores were started, and the last of the query tile.
  int32_t kv, kv_begin;

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }

  __device__ __forceinline__ int q_stage() const {
    return static_cast<int>(opened % kConfig.q_stages);
  }
  __device__ __forceinline__ const Tile& tile() const {
    return smem.tile(static_cast<int>(opened % kConfig.tile_stages()));
  }

  // The place of the i-th key tile, keys and values alike.
  __device__ __forceinline__ static int stage_of(uint32_t i) {
    return static_cast<int>(i % kConfig.stages);
  }
  __device__ __forceinline__ static uint32_t phase_of(uint32_t i) { return i / kConfig.stages % 2; }

  // Barriers are asked early and waited for, if need be, late: an answer takes a hundred cycles.
  __device__ __forceinline__ bool keys_came() const {
    return ptx::mbarrier_test_wait(smem.k_full(stage_of(tiles)), phase_of(tiles));
  }
  __device__ __forceinline__ bool values_came() const {
    return ptx::mbarrier_test_wait(smem.v_full(stage_of(tiles)), phase_of(tiles));
  }
  __device__ __forceinline__ void wait_values(bool came) const {
    if (!came) wait(smem.v_full(stage_of(tiles)), phase_of(tiles));
  }

  __device__ __forceinline__ void start_scores() {
    const int stage = stage_of(tiles);
    if (!k_came) wait(smem.k_full(stage), phase_of(tiles));
    rows.start_scores(scores, smem.q(q_stage()) + group * kConfig.q_rows_bytes(), smem.k(stage));
  }
  // O += P V of the last key tile, whose values have come.
  __device__ __forceinline__ void start_out() { rows.start_out(smem.v(stage_of(tiles - 1))); }
  // S has been computed: gives back the keys and, after the last of them, the queries.
  __device__ __forceinline__ void release_k() {
    ptx::mbarrier_arrive_if(smem.k_empty(stage_of(tiles)), speaks());
    ptx::mbarrier_arrive_if(smem.q_empty(q_stage()), speaks() && kv == kv_begin);
  }
  __device__ __forceinline__ void release_v() {
    ptx::mbarrier_arrive_if(smem.v_empty(stage_of(tiles - 1)), speaks());
  }

  // Consumers that start their products one after the other do not wait for each other's later. A
  // turn is a step, of which all have the same number in a call without a mask.
  __device__ __forceinline__ bool has_turns() const {
    return kConfig.turns && !call.args.mask.is_banded();
  }
  __device__ __forceinline__ void take_turn() const {
    if (has_turns()) ptx::barrier_sync(kTurnBarrier + group, 2 * 128);
  }
  __device__ __forceinline__ void give_turn() const {
    if (has_turns()) ptx::barrier_arrive(kTurnBarrier + (group + 1) % kConfig.consumers, 2 * 128);
  }

  // What comes before (E6). Returns whether the mask cuts the tile.
  __device__ __forceinline__ bool prepare_scores() {
    const bool cut = is_cut<kConfig>(tile(), kv);
    if (call.sign != 1) rows.scale_scores(scores, call.sign);
    if (cut) rows.hide(scores, call.args.mask, call.plan, tile().row_begin + 64 * group, kv);
    return cut && call.args.mask.is_banded();
  }
  // Values that the inspectors have looked through.
  __device__ __forceinline__ void note_nonfinite() {
    nonfinite |= smem.nonfinite(stage_of(tiles)) != 0;
  }

  // S = Q K^T of a key tile runs with O += P V of the one before, and its softmax under the latter,
  // which must have ended before P is written: half the exponentials come first. `kPlain`: no mask
  // cuts the tile, and the scale is positive.
  template <bool kPlain>
  __device__ __forceinline__ void step() {
    take_turn();
    start_scores();
    start_out();
    give_turn();
    ptx::wgmma_wait<1>();
    ptx::held(scores);
    release_k();
    const bool inspected = !kPlain && prepare_scores();
    const bool raised = rows.raise_maxima(scores, call.scale_log2);
    const bool v_came = values_came();
    auto w = rows.begin_weighing(scores);
    rows.template weigh<0, Rows::kMiddle>(scores, w);
    ptx::held(scores);
    wait_values(v_came);
    if (inspected) note_nonfinite();
    ptx::wgmma_wait<0>();
    ptx::held(rows.out);
    ptx::held(rows.p);
    release_v();
    ++tiles;
    k_came = keys_came();
    if (raised) rows.rescale(rows.alpha);
    rows.template weigh<Rows::kMiddle, Rows::kScores>(scores, w);
    rows.end_weighing(scores, w);
  }

  // The first key behind those that the warpgroup's rows see.
  __device__ __forceinline__ int32_t seen_end(const Tile& tile) const {
    const Mask& mask = call.args.mask;
    if (mask.diagonal_max == Mask::kUnbounded) return mask.s_kv;
    const int32_t q_last = call.plan.query_of(tile.row_begin + 64 * group + 63);
    return static_cast<int32_t>(
        min(max(int64_t{q_last} + mask.diagonal_max + 1, int64_t{0}), int64_t{mask.s_kv}));
  }

  // Key tiles that none of the warpgroup's rows sees, as long as another is left.
  __device__ __forceinline__ void skip_tiles(int32_t seen_end) {
    while (kv >= seen_end && kv != kv_begin) {
      const int stage = stage_of(tiles);
      wait(smem.k_full(stage), phase_of(tiles));
      if (speaks()) ptx::mbarrier_arrive(smem.k_empty(stage));
      wait(smem.v_full(stage), phase_of(tiles));
      if (speaks()) ptx::mbarrier_arrive(smem.v_empty(stage));
      ++tiles;
      k_came = false;
      kv -= kConfig.tile_n;
    }
  }

  // The first key tile of a query tile, with no product of this warpgroup beside it.
  __device__ __forceinline__ void begin_rows() {
    rows.reset();
    start_scores();
    const bool v_came = values_came();
    ptx::wgmma_wait<0>();
    ptx::held(scores);
    release_k();
    const bool inspected = prepare_scores();
    rows.raise_to_tile(scores, call.scale_log2);
    auto w = rows.begin_weighing(scores);
    rows.template weigh<0, Rows::kScores>(scores, w);
    rows.end_weighing(scores, w);
    wait_values(v_came);
    if (inspected) note_nonfinite();
    ++tiles;
    k_came = keys_came();
  }

  // No mask cuts the key tiles from here on up to plain_end of the query tile.
  __device__ __forceinline__ int32_t plain_begin() const {
    return call.sign == 1 ? max(kv_begin, tile().plain_begin) : INT32_MAX;
  }

  __device__ __forceinline__ void run_rows() {
    kv_begin = tile().kv_begin;
    kv = kv_begin + (tile().kv_blocks - 1) * kConfig.tile_n;
    skip_tiles(seen_end(tile()));
    begin_rows();
    while (kv != kv_begin) {
      kv -= kConfig.tile_n;
      if (kv < plain_begin() || kv + kConfig.tile_n > tile().plain_end) {
        step<false>();
        continue;
      }
      const int32_t end = kTight ? 0 : plain_begin() + kConfig.tile_n;
#pragma unroll 1
      for (;;) {
        step<true>();
        if (kv < (kTight ? plain_begin() + kConfig.tile_n : end)) break;
        kv -= kConfig.tile_n;
      }
    }
    start_out();
    rows.sum_quads();
    finish_states(tile());
    ptx::wgmma_wait<0>();
    ptx::held(rows.out);
    ptx::held(rows.p);
    release_v();
  }

  // A split with no key that the query tile sees.
  __device__ __forceinline__ void pass_rows() {
    if (speaks()) ptx::mbarrier_arrive(smem.q_empty(q_stage()));
    rows.reset();
    finish_states(tile());
  }

  __device__ __forceinline__ void run() {
    if (group == kConfig.consumers - 1) give_turn();
    for (;; ++opened) {
      wait(smem.q_full(q_stage()), opened / kConfig.q_stages % 2);
      if (tile().row_begin < 0) return;
      if (tile().kv_blocks > 0) {
        run_rows();
      } else {
        pass_rows();
      }
      store(tile());
    }
  }

  // Where a row of the query tile goes.
  struct RowPlace {
    int32_t h, q_idx;
    int64_t row;  // of [B, H, S_q]
    bool exists;
  };
  __device__ __forceinline__ RowPlace place(const Tile& tile, int in_group) const {
    const TilePlan& plan = call.plan;
    const Shape& shape = call.args.shape;
    const int32_t row = tile.row_begin + 64 * group + in_group;
    const int32_t q_idx = plan.query_of(row), h = tile.h + row - q_idx * plan.pack;
    return {h, q_idx, (int64_t{tile.b} * shape.H + h) * shape.S_q + q_idx, q_idx < call.last_query};
  }

  // The rows' lse, or what combine needs, and what the outputs are to be multiplied by, in alpha.
  __device__ __forceinline__ void finish_states(const Tile& tile) {
    const bool whole = call.plan.splits == 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows.alpha[h] = whole ? rows.inverse_sum(h) : 1;
      const RowPlace at = place(tile, rows.row(h));
      if (!at.exists || rows.lane() % 4 != 0) continue;
      if (whole) {
        static_cast<float*>(call.args.lse)[at.row] = rows.lse(h);
      } else {
        call.partial.states[tile.split * call.partial.rows + at.row] = rows.softmax[h];
      }
    }
  }

  __device__ __forceinline__ void store(const Tile& tile) {
    const ForwardArgs& args = call.args;
    const SplitBuffers<float>& partial = call.partial;
    const int64_t columns = partial.padded_columns(args.shape);
    const auto D_v = static_cast<int>(args.shape.D_v);
    const RowPlace places[2] = {place(tile, rows.row(0)), place(tile, rows.row(1))};
    if (call.plan.splits == 1) {
      const auto out = [&](const RowPlace& at) {
        return args.out.row<Element>(tile.b, at.h, at.q_idx);
      };
      rows.rescale(rows.alpha);
      rows.write_rows({places[0].exists ? out(places[0]) : nullptr,
                       places[1].exists ? out(places[1]) : nullptr},
                      D_v);
      if (nonfinite) add_nonfinite<Element>(tile, out);
    } else {  // before normalisation
      const auto out = [&](const RowPlace& at) {
        return partial.out + (tile.split * partial.rows + at.row) * columns;
      };
      rows.write_sums({places[0].exists ? out(places[0]) : nullptr,
                       places[1].exists ? out(places[1]) : nullptr},
                      D_v);
      if (nonfinite) add_nonfinite<float>(tile, out);
    }
    nonfinite = false;
  }

  // Adds the Inf and NaN elements of values that the mask cuts, which the product has seen as
  // zeros, to the warp's rows that see their keys, which it has just written to out(place). Exact
  // weights are positive, so the sum is what the weighted one would be, whenever it is taken.
  template <typename Out, typename RowOf>
  __device__ __forceinline__ void add_nonfinite(const Tile& tile, const RowOf& out) const {
    const ForwardArgs& args = call.args;
    __syncwarp();
#pragma unroll 1
    for (int i = rows.lane(); i < 16 * args.shape.D_v; i += 32) {
      const int column = i / 16;
      const RowPlace at = place(tile, 16 * rows.warp() + i % 16);
      if (!at.exists) continue;
      const KvRange seen =
          call.plan.cut_to_split(args.mask.kv_range(at.q_idx, at.q_idx + 1), tile.split);
      const Element* value =
          args.v.row<const Element>(tile.b, at.h / call.plan.group, seen.begin) + column;
      float sum = 0;
#pragma unroll 1
      for (int32_t kv_idx = seen.begin; kv_idx < seen.end; ++kv_idx, value += args.v.stride_s) {
        const float x = static_cast<float>(*value);
        if (!isfinite(x)) sum += x;
      }
      if (sum == 0) continue;
      Out& x = out(at)[column];
      x = static_cast<Out>(sum + static_cast<float>(x));  // may be NaN already
    }
  }
};

}  // namespace online_attention::cuda::hopper
