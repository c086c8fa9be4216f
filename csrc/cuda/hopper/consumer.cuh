// SPDX-License-Identifier: BSD-3-Clause
// A consumer warpgroup's main loop and epilogue.
#pragma once

#include "cuda/hopper/producer.cuh"
#include "cuda/hopper/warpgroup_tile.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, ForwardConfig kConfig>
struct Consumer {
  using Map = SharedMap<kConfig>;
  static constexpr int kBoxBytes = 64 * ForwardConfig::kRowBytes;  // of a group's rows

  const ForwardCall& call;
  const Map& smem;
  int group;  // 0 .. consumers - 1
  typename Map::QPlace q;
  uint32_t tiles = 0;  // key tiles whose scores are done; the values of the last are still to come
  WarpgroupTile<Element, kConfig> rows;
  float inverse_sum[2];    // of the finished query tile
  int finished = -1;       // the stage of a query tile whose outputs are to be stored
  int stored = -1;         // the stage of one whose store may still read shared memory
  bool nonfinite = false;  // some value of the query tile was, see inspect_values

  // The last key tile whose scores were started, and whether it is the first of its query tile and
  // whether the mask cuts it.
  int stage;  // of its query tile
  bool first, cut;
  int32_t kv, kv_begin;

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }
  __device__ __forceinline__ void take_turn() const {
    if constexpr (kConfig.take_turns) ptx::barrier_sync(kTurnBarrier + group, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (kConfig.take_turns) {
      const int next = group + 1 == kConfig.consumers ? 0 : group + 1;
      ptx::barrier_arrive(kTurnBarrier + next, 256);
    }
  }

  __device__ __forceinline__ uint32_t q_rows(int stage) const {
    return smem.q(stage) + group * kConfig.q_rows_bytes();
  }
  // The place of the i-th key tile, keys and values alike.
  __device__ __forceinline__ static int stage_of(uint32_t i) {
    static_assert(kConfig.stages == 2 || kConfig.stages == 4);
    return static_cast<int>(i % kConfig.stages);
  }
  __device__ __forceinline__ static uint32_t phase_of(uint32_t i) { return i / kConfig.stages % 2; }

  __device__ __forceinline__ void start_scores() {
    const int stage = stage_of(tiles);
    wait(smem.k_full(stage), phase_of(tiles));
    rows.start_scores(q_rows(q.stage), smem.k(stage));
  }
  __device__ __forceinline__ void release_k() {
    if (speaks()) ptx::mbarrier_arrive(smem.k_empty(stage_of(tiles)));
  }
  __device__ __forceinline__ void wait_values() {
    wait(smem.v_full(stage_of(tiles)), phase_of(tiles));
  }
  __device__ __forceinline__ void release_v() {
    if (speaks()) ptx::mbarrier_arrive(smem.v_empty(stage_of(tiles - 1)));
  }
  // Gives the Q tile back whose part of shared memory the last store has read.
  __device__ __forceinline__ void release_q() {
    if (stored < 0) return;
    if (speaks()) {
      ptx::tma_store_wait_read<0>();
      ptx::mbarrier_arrive(smem.q_empty(stored));
    }
    stored = -1;
  }

  // The last key tile of the query tile at q; false: there is no further query tile.
  __device__ __forceinline__ bool open_tile() {
    wait(smem.q_full(q.stage), q.phase);
    const Tile& tile = smem.tile(q.stage);
    if (tile.q_begin < 0) return false;
    kv_begin = tile.kv_begin;
    kv = kv_begin + (tile.kv_blocks - 1) * kConfig.tile_n;
    return true;
  }
  // Key tiles come from the last to the first.
  __device__ __forceinline__ bool advance(bool& first) {
    first = kv == kv_begin;
    if (first) {
      q.advance();
      return open_tile();
    }
    kv -= kConfig.tile_n;
    return true;
  }

  // (E6) `kPlain`: no mask cuts the tile, it is not the first of its query tile, and the scale is
  // positive.
  template <bool kPlain>
  __device__ __forceinline__ bool raise_maxima() {
    if constexpr (!kPlain) {
      if (first) rows.reset_softmax();
      if (call.sign != 1) rows.scale_scores(call.sign);
      if (cut) rows.hide(call.args.mask, smem.tile(q.stage).q_begin + 64 * group, kv);
    }
    return rows.raise_maxima(call.scale_log2);
  }

  // S = Q K^T of the next key tile runs with O += P V of the last, and the softmax of the next
  // under the latter. Query tiles follow each other without a break: where the next key tile opens
  // one, the outputs of the one before are stored under its second S = Q K^T.
  //
  // The branches in the softmax stand where they do because ptxas moves no instruction across one.
  // Without them it adds each probability to its sum as soon as it has issued the exponential, and
  // waits for that one's latency 64 times; and it lets most exponentials wait for O.
  template <bool kPlain>
  __device__ __forceinline__ void step(bool opens) {
    take_turn();
    start_scores();
    if constexpr (kPlain) {
      rows.start_out(smem.v(stage_of(tiles - 1)), true);
    } else {
      if (finished >= 0) store();
      if (cut && call.args.mask.is_banded()) nonfinite |= smem.nonfinite(stage_of(tiles - 1)) != 0;
      rows.start_out(smem.v(stage_of(tiles - 1)), !first);
    }
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::held(rows.scores);
    release_k();
    if constexpr (!kPlain) {
      first = opens;
      cut = is_cut<kConfig>(smem.tile(q.stage), kv);
      if (first) finish_rows(stage);
    }
    const bool raised = raise_maxima<kPlain>();
    rows.template weigh<0>();
    ptx::held(rows.scores);
    wait_values();  // a branch
    ptx::wgmma_wait<0>();
    ptx::held(rows.out);
    ptx::held(rows.p);
    release_v();
    rows.template weigh<1>();
    rows.template absorb<0>();
    ptx::held(rows.scores);
    ptx::held(rows.p);
    if (raised && (kPlain || !first)) rows.rescale(rows.alpha);  // a branch
    rows.template absorb<1>();
    if constexpr (!kPlain) {
      if (first) {
        finished = stage;
        stage = q.stage;
      }
      release_q();
    }
    ++tiles;
  }

  __device__ __forceinline__ void run() {
    if (group == kConfig.consumers - 1) pass_turn();  // the first turn is group 0's
    if (!open_tile()) return;
    stage = q.stage;
    first = true;
    cut = is_cut<kConfig>(smem.tile(q.stage), kv);
    take_turn();
    start_scores();
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::held(rows.scores);
    release_k();
    raise_maxima<false>();
    rows.template weigh<0>();
    rows.template weigh<1>();
    rows.template absorb<0>();
    rows.template absorb<1>();
    wait_values();
    ++tiles;
    bool opens;
    while (advance(opens)) {
      step<false>(opens);
      if (first || cut || call.sign != 1) continue;
      const int32_t plain_end = max(kv_begin, smem.tile(q.stage).plain_begin) + kConfig.tile_n;
#pragma unroll 1
      while (kv >= plain_end) {
        kv -= kConfig.tile_n;
        step<true>(false);
      }
    }
    if (finished >= 0) store();
    if (cut && call.args.mask.is_banded()) nonfinite |= smem.nonfinite(stage_of(tiles - 1)) != 0;
    rows.start_out(smem.v(stage_of(tiles - 1)), !first);
    finish_rows(stage);
    ptx::wgmma_wait<0>();
    ptx::held(rows.out);
    ptx::held(rows.p);
    finished = stage;
    store();
    if (speaks()) ptx::tma_store_wait_read<0>();  // shared memory must outlive the store
  }

  // The sums are complete but for the quad: lse, and what the outputs are to be multiplied by.
  __device__ __forceinline__ void finish_rows(int stage) {
    const ForwardArgs& args = call.args;
    const Tile& tile = smem.tile(stage);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      SoftmaxRow<float>& row = rows.softmax[h];
      row.l = quad_sum(row.l);
      inverse_sum[h] = row.inverse_sum();  // (E9)
      const int32_t q_idx = tile.q_begin + 64 * group + rows.row(h);
      if (threadIdx.x % 4u == 0 && q_idx < args.shape.S_q) {
        const int64_t head = int64_t{tile.b} * args.shape.H + tile.h;
        static_cast<float*>(args.lse)[head * args.shape.S_q + q_idx] = row.lse();  // (E10)
      }
    }
  }

  // Stores the finished tile through this group's part of its Q tile, which nobody reads any more.
  __device__ __forceinline__ void store() {
    const Tile& tile = smem.tile(finished);
    rows.rescale(inverse_sum);
    ptx::barrier_sync(kGroupBarrier + group, 128);  // all four warps are done with Q
    const uint32_t target = q_rows(finished) + 16 * rows.warp() * ForwardConfig::kRowBytes;
    rows.write_out(target, kBoxBytes);
    const int32_t q_idx = tile.q_begin + 64 * group + 16 * rows.warp();
    if (nonfinite) add_nonfinite(tile, q_idx, target);
    nonfinite = false;
    ptx::fence_async_proxy();
    __syncwarp();
    if (speaks()) {
#pragma unroll
      for (int c = 0; c < kConfig.value_boxes(); ++c) {
        ptx::tma_store(call.out.map, target + c * kBoxBytes, c * ForwardConfig::kColumns, q_idx,
                       tile.h * call.out.step_h, tile.b * call.out.step_b);
      }
      ptx::tma_store_commit();
    }
    stored = finished;
    finished = -1;
  }

  // Adds the Inf and NaN elements of values that the mask cuts, which the product has seen as
  // zeros, to the warp's rows that see their keys, at `target` in shared memory. Exact weights are
  // positive, so the sum is what the weighted one would be, whenever it is taken.
  __device__ __forceinline__ void add_nonfinite(const Tile& tile, int32_t q_idx, uint32_t target) {
    const ForwardArgs& args = call.args;
    __syncwarp();
#pragma unroll 1
    for (int i = rows.lane(); i < 16 * args.shape.D_v; i += 32) {
      const int row = i % 16, column = i / 16;
      const KvRange seen = args.mask.kv_range(q_idx + row, q_idx + row + 1);
      const Element* value =
          args.v.row<const Element>(tile.b, tile.h / call.plan.group, seen.begin) + column;
      float sum = 0;
#pragma unroll 1
      for (int32_t kv_idx = seen.begin; kv_idx < seen.end; ++kv_idx, value += args.v.stride_s) {
        const float x = static_cast<float>(*value);
        if (!isfinite(x)) sum += x;
      }
      if (sum == 0) continue;
      const int chunk = column / 8 % 8 ^ row % 8;
      const uint32_t address = target + column / 64 * kBoxBytes + row * ForwardConfig::kRowBytes +
                               chunk * 16 + column % 8 * 2;
      sum += static_cast<float>(ptx::load_shared_element<Element>(address));  // may be NaN already
      ptx::store_shared_element(address, static_cast<Element>(sum));
    }
  }
};

}  // namespace online_attention::cuda::hopper
