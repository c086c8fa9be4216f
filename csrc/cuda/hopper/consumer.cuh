// SPDX-License-Identifier: BSD-3-Clause
// A consumer warpgroup's main loop and epilogue.
#pragma once

#include "cuda/hopper/producer.cuh"
#include "cuda/hopper/warpgroup_tile.cuh"
#include "cuda/ptx/barrier.cuh"

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
  // Whether the keys of the next one, and the values of the last, are known to be there.
  bool k_came = false, v_came = false;
  Rows rows;
  typename Rows::Scores scores;
  bool inspected = false;  // whether the last values are, see inspect_values
  bool nonfinite = false;  // some value of the query tile was

  // The last key tile whose scores were started, and the last of the query tile.
  int32_t kv, kv_begin;

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }

  // The place of the i-th query tile, and of its Tile.
  __device__ __forceinline__ static int q_stage_of(uint32_t i) {
    return static_cast<int>(i % kConfig.q_stages);
  }
  __device__ __forceinline__ const Tile& tile_of(uint32_t i) const {
    return smem.tile(static_cast<int>(i % kConfig.tile_stages()));
  }
  __device__ __forceinline__ void wait_queries(uint32_t i) const {
    wait(smem.q_full(q_stage_of(i)), i / kConfig.q_stages % 2);
  }
  __device__ __forceinline__ int q_stage() const { return q_stage_of(opened); }
  __device__ __forceinline__ const Tile& tile() const { return tile_of(opened); }

  // The place of the i-th key tile, keys and values alike.
  __device__ __forceinline__ static int stage_of(uint32_t i) {
    return static_cast<int>(i % kConfig.stages);
  }
  __device__ __forceinline__ static uint32_t phase_of(uint32_t i) { return i / kConfig.stages % 2; }

  // Barriers are asked early, under the softmax, and waited for, if need be, late: an answer takes
  // a hundred cycles. Of the next keys, and of the values that belong to these scores.
  __device__ __forceinline__ void ask_ahead() {
    const uint32_t next = tiles + 1;
    v_came = ptx::mbarrier_test_wait(smem.v_full(stage_of(tiles)), phase_of(tiles));
    k_came = ptx::mbarrier_test_wait(smem.k_full(stage_of(next)), phase_of(next));
  }
  __device__ __forceinline__ void wait_keys() const {
    if (!k_came) wait(smem.k_full(stage_of(tiles)), phase_of(tiles));
  }
  // For O += P V of the last key tile; what the inspectors say of its values.
  __device__ __forceinline__ void wait_values() {
    if (!v_came) wait(smem.v_full(stage_of(tiles - 1)), phase_of(tiles - 1));
    if (inspected) nonfinite |= smem.nonfinite(stage_of(tiles - 1)) != 0;
    inspected = false;
  }

  template <int kCount>
  __device__ __forceinline__ void start_scores(float (&scores)[kCount]) {
    rows.start_scores(scores, smem.q(q_stage()) + group * kConfig.q_rows_bytes(),
                      smem.k(stage_of(tiles)));
  }
  // O += P V of a key tile whose values have come.
  __device__ __forceinline__ void start_out(uint32_t i) { rows.start_out(smem.v(stage_of(i))); }
  // S has been computed: gives back the keys and, after the last of them, the queries.
  __device__ __forceinline__ void release_k() {
    ptx::mbarrier_arrive_if(smem.k_empty(stage_of(tiles)), speaks());
    ptx::mbarrier_arrive_if(smem.q_empty(q_stage()), speaks() && kv == kv_begin);
  }
  // O is complete; P may be written and the values' place filled anew.
  __device__ __forceinline__ void finish_out(uint32_t i) {
    ptx::wgmma_wait<0>();
    ptx::held(rows.out);
    ptx::held(rows.p);
    ptx::mbarrier_arrive_if(smem.v_empty(stage_of(i)), speaks());
  }

  // What comes before (E6).
  template <int kCount>
  __device__ __forceinline__ void prepare_scores(float (&scores)[kCount]) {
    const bool cut = is_cut<kConfig>(tile(), kv);
    if (call.sign != 1) rows.scale_scores(scores, call.sign);
    if (cut) rows.hide(scores, call.args.mask, call.plan, tile().row_begin + 64 * group, kv);
    inspected = cut && call.args.mask.is_banded();
  }

  // With turns, a consumer starts the products of a key tile when the one before it has started
  // its own. All have as many turns: a key tile left out is one too.
  __device__ __forceinline__ void take_turn() const {
    if (kConfig.turns) ptx::barrier_sync(kTurnBarrier + group, 2 * 128);
  }
  __device__ __forceinline__ void pass_turn() const {
    if (kConfig.turns) {
      ptx::barrier_arrive(kTurnBarrier + (group + 1) % kConfig.consumers, 2 * 128);
    }
  }

  // S = Q K^T of a key tile runs beside O += P V of the one before. `kPlain`: no mask cuts the
  // tile, and the scale is positive.
  template <bool kPlain>
  __device__ __forceinline__ void step() {
    wait_keys();
    wait_values();
    take_turn();
    start_scores(scores);
    start_out(tiles - 1);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::held(scores);
    release_k();
    if constexpr (!kPlain) prepare_scores(scores);
    const bool raised = rows.raise_maxima(scores, call.scale_log2);
    finish_out(tiles - 1);
    ask_ahead();
    if (raised) rows.rescale(rows.alpha);
    rows.weigh(scores);
    ++tiles;
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
      take_turn();
      pass_turn();
      ++tiles;
      k_came = false;
      kv -= kConfig.tile_n;
    }
  }

  // Where the query tile's key tiles begin for this warpgroup. Returns whether its rows see only
  // the first keys there.
  __device__ __forceinline__ bool open_rows() {
    kv_begin = tile().kv_begin;
    kv = kv_begin + (tile().kv_blocks - 1) * kConfig.tile_n;
    const int32_t end = seen_end(tile());
    skip_tiles(end);
    return kv + kConfig.first_keys >= end;
  }

  // The first key tile of a query tile, with no product of this warpgroup beside it.
  __device__ __forceinline__ void begin_rows() {
    const bool first_alone = open_rows();
    rows.reset();
    wait_keys();
    if (kConfig.first_keys > 0 && first_alone) {
      typename Rows::FirstScores first;
      begin_scores(first);
    } else {
      begin_scores(scores);
    }
    nonfinite = false;
    ++tiles;
  }
  template <int kCount>
  __device__ __forceinline__ void begin_scores(float (&scores)[kCount]) {
    take_turn();
    start_scores(scores);
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::held(scores);
    release_k();
    ask_ahead();
    prepare_scores(scores);
    rows.raise_to_tile(scores, call.scale_log2);
    rows.weigh(scores);
  }

  // No mask cuts the key tiles from here on up to plain_end of the query tile.
  __device__ __forceinline__ int32_t plain_begin() const {
    return call.sign == 1 ? max(kv_begin, tile().plain_begin) : INT32_MAX;
  }

  // All key tiles but the first, and all of O but that of the last.
  __device__ __forceinline__ void run_steps() {
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
    wait_values();
  }

  // Whether another query tile follows whose first key tile may run beside the last O += P V of
  // this one; its queries have come then. What is rare ends a chain: in the loop of chained tiles
  // nothing may branch on what differs between threads, or ptxas takes warps for divergent, wants
  // them to meet before each product and moves descriptors there one by one.
  __device__ __forceinline__ bool has_next() const {
    if (!kConfig.chained() || nonfinite || call.plan.splits > 1) return false;
    wait_queries(opened + 1);
    const Tile& next = tile_of(opened + 1);
    return next.row_begin >= 0 && next.kv_blocks > 0;
  }

  // The last O += P V of a query tile, with nothing beside it.
  __device__ __forceinline__ void end_rows() {
    const bool whole = call.plan.splits == 1;
    start_out(tiles - 1);
    RowFactors factors;
    if (whole) factors = finish_states(tile(), rows.softmax);
    finish_out(tiles - 1);
    if (whole) {
      store_rows(tile(), factors);
      if (nonfinite) {
        add_nonfinite<Element>(tile(), [&](const RowPlace& at) { return out_row(tile(), at); });
      }
    } else {
      store_split(tile());
    }
  }

  // The same beside the first key tile of the next one: a step from one query tile to the other. No
  // values are waited for before the place of the last ones is free, which they may come to.
  __device__ __forceinline__ void chain_rows() {
    const Tile& ended = tile();
    const SoftmaxRow<float> softmax[2] = {rows.softmax[0], rows.softmax[1]};
    const uint32_t last = tiles - 1;
    ++opened;
    open_rows();
    wait_keys();
    take_turn();
    start_scores(scores);
    start_out(last);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::held(scores);
    release_k();
    prepare_scores(scores);
    rows.reset_softmax();
    rows.raise_to_tile(scores, call.scale_log2);
    finish_out(last);
    ask_ahead();
    rows.weigh(scores);
    store_rows(ended, finish_states(ended, softmax));
    rows.clear();
    nonfinite = false;
    ++tiles;
  }

  // A split with no key that the query tile sees.
  __device__ __forceinline__ void pass_rows() {
    if (speaks()) ptx::mbarrier_arrive(smem.q_empty(q_stage()));
    rows.reset();
    nonfinite = false;
    store_split(tile());
  }

  __device__ __forceinline__ void run() {
    if (group == kConfig.consumers - 1) pass_turn();
    for (;; ++opened) {
      wait_queries(opened);
      if (tile().row_begin < 0) return;
      if (tile().kv_blocks > 0) {
        begin_rows();
#pragma unroll 1
        for (;;) {
          run_steps();
          if (!has_next()) break;
          chain_rows();
        }
        end_rows();
      } else {
        pass_rows();
      }
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

  struct RowFactors {
    float of[2];
  };
  // What the outputs are to be multiplied by; writes the rows' lse.
  __device__ __forceinline__ RowFactors finish_states(const Tile& tile,
                                                      const SoftmaxRow<float> (&softmax)[2]) const {
    RowFactors factors;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      SoftmaxRow<float> row = softmax[h];
      row.l = quad_sum(row.l);
      factors.of[h] = Rows::inverse_sum(row);
      const RowPlace at = place(tile, rows.row(h));
      ptx::store_if(static_cast<float*>(call.args.lse) + at.row, Rows::lse(row),
                    at.exists && rows.lane() % 4 == 0);
    }
    return factors;
  }
  __device__ __forceinline__ void store_rows(const Tile& tile, const RowFactors& factors) {
    rows.rescale(factors.of);
    const RowPlace places[2] = {place(tile, rows.row(0)), place(tile, rows.row(1))};
    rows.write_rows({out_row(tile, places[0]), out_row(tile, places[1])},
                    {places[0].exists, places[1].exists}, static_cast<int>(call.args.shape.D_v));
  }
  __device__ __forceinline__ Element* out_row(const Tile& tile, const RowPlace& at) const {
    return call.args.out.row<Element>(tile.b, at.h, at.q_idx);
  }

  // The same for a split: states and sums for combine.
  __device__ __forceinline__ void store_split(const Tile& tile) {
    const SplitBuffers<float>& partial = call.partial;
    const int64_t columns = partial.padded_columns(call.args.shape);
    const auto row_of = [&](const RowPlace& at) {
      return partial.out + (tile.split * partial.rows + at.row) * columns;
    };
    const RowPlace places[2] = {place(tile, rows.row(0)), place(tile, rows.row(1))};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      SoftmaxRow<float> row = rows.softmax[h];
      row.l = quad_sum(row.l);
      if (!places[h].exists || rows.lane() % 4 != 0) continue;
      partial.states[tile.split * partial.rows + places[h].row] = row;
    }
    rows.write_sums({places[0].exists ? row_of(places[0]) : nullptr,
                     places[1].exists ? row_of(places[1]) : nullptr},
                    static_cast<int>(call.args.shape.D_v));
    if (nonfinite) add_nonfinite<float>(tile, row_of);
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
