// SPDX-License-Identifier: BSD-3-Clause
// A consumer warpgroup of the backward: the steps over the query tiles, dK and dV at the end.
#pragma once

#include "cuda/hopper/backward_loader.cuh"
#include "cuda/hopper/backward_tile.cuh"
#include "cuda/hopper/producer.cuh"
#include "cuda/ptx/barrier.cuh"

namespace online_attention::cuda::hopper {

// The steps that a copy of their code runs: those that no mask cuts, and those where more is to be
// done about hidden pairs and Inf and NaN.
enum class Steps { plain, cut };

template <typename Element, BackwardConfig kConfig>
struct BackwardConsumer {
  using Map = BackwardMap<kConfig>;
  using Tile = BackwardTile<Element, kConfig>;
  static constexpr int kThreads = 128 * BackwardConfig::kGroups;

  const BackwardCall& call;
  const Map& smem;
  int group;  // 0 or 1
  Tile keys;
  uint32_t index = 0;   // of the step, over all key tiles
  uint32_t tiles = 0;   // key tiles that are done
  bool first;           // whether it is the first step of its key tile
  bool marked = false;  // whether some key of the block held Inf or NaN

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }
  __device__ __forceinline__ static int thread() {  // of both consumers'
    return static_cast<int>(ptx::thread_index()) - 128;
  }
  __device__ __forceinline__ const KeyTile& tile() const { return smem.tile(tiles); }
  // Of this step, once its queries have come.
  __device__ __forceinline__ const LoadedStep& step() const { return smem.step(index); }
  __device__ __forceinline__ static void wait_for_consumers() {
    ptx::barrier_sync(kConsumersBarrier, kThreads);
  }
  __device__ __forceinline__ static int stage_of(uint32_t i) { return static_cast<int>(i % 2); }
  __device__ __forceinline__ static uint32_t phase_of(uint32_t i) { return i / 2 % 2; }
  __device__ __forceinline__ static void release(uint32_t barrier) {
    if (speaks()) ptx::mbarrier_arrive(barrier);
  }
  // The group's rows of K or V.
  __device__ __forceinline__ uint32_t rows_of(uint32_t tile) const {
    return tile + group * 64 * BackwardConfig::kRowBytes;
  }

  // What is hidden does not exist (E24), yet 0 * NaN is NaN: under a mask, Inf and NaN must leave
  // the tiles that dS and P multiply. Keys of the block, once: those that hold some are cleared
  // and get a NaN mark, which makes P and dS of the queries that see them NaN.
  __device__ __forceinline__ void mark_nonfinite_keys() {
    const int i = thread();
    if (i < BackwardConfig::kTileN) ptx::store_shared(smem.mark(i), 0u);
    constexpr uint32_t kStep = kThreads * 16;
    const uint32_t begin = smem.k() + i * 16, end = smem.k() + kConfig.kv_bytes();
    const bool found = has_nonfinite<Element>(begin, end, kStep);
    marked = ptx::barrier_or(kConsumersBarrier, kThreads, found);
    if (!marked) return;
    if (found) {
#pragma unroll 1
      for (uint32_t address = begin; address < end; address += kStep) {
        if (!has_nonfinite<Element>(address, address + 16, 16)) continue;
        const int key = (address - smem.k()) / BackwardConfig::kRowBytes % BackwardConfig::kTileN;
        ptx::store_shared(smem.mark(key), 0x7fffffffu);
      }
      clear_nonfinite<Element>(begin, end, kStep);
    }
    wait_for_consumers();
  }
  // Queries of a step, where the mask cuts it: if a query or a dO holds Inf or NaN, its lse or its
  // delta is not finite. Of Q no trace need be kept: a query that is not finite has no finite P.
  // Returns whether dO had such elements. No product must be running.
  __device__ __forceinline__ bool clear_nonfinite_queries(int stage) const {
    bool finite = true;
    for (int i = keys.lane(); i < kConfig.tile_m; i += 32) {
      finite &= isfinite(__uint_as_float(ptx::load_shared(smem.lse2(stage) + 4 * i))) &&
                isfinite(__uint_as_float(ptx::load_shared(smem.delta(stage) + 4 * i)));
    }
    if (__all_sync(0xffffffffu, finite)) return false;  // every warp sees all terms
    wait_for_consumers();                               // everybody has read Q and dO as they are
    constexpr uint32_t kStep = kThreads * 16;
    const uint32_t q = smem.q(stage), dout = smem.dout(stage), at = thread() * 16;
    clear_nonfinite<Element>(q + at, q + kConfig.q_bytes(), kStep);
    const bool found = has_nonfinite<Element>(dout + at, dout + kConfig.q_bytes(), kStep);
    if (found) clear_nonfinite<Element>(dout + at, dout + kConfig.q_bytes(), kStep);
    return ptx::barrier_or(kConsumersBarrier, kThreads, found);
  }
  // Adds Inf and NaN elements of dO, which dV has seen as zeros, to the keys that their rows see.
  // Exact weights are positive, so the sum is what the weighted one would be.
  __device__ __forceinline__ void add_nonfinite_dout() {
    const BackwardArgs& args = call.args;
    const int32_t kv = tile().kv_begin + 64 * group;
    const int32_t q_begin = step().q_tile * kConfig.tile_m;
    const int32_t q_end = min(q_begin + kConfig.tile_m, static_cast<int32_t>(args.shape.S_q));
#pragma unroll 1
    for (int32_t q_idx = q_begin; q_idx < q_end; ++q_idx) {
      const Element* row = args.dout.row<const Element>(tile().b, step().h, q_idx);
      const KvRange seen = args.mask.kv_range(q_idx, q_idx + 1);
#pragma unroll
      for (int i = 0; i < Tile::kGradients; ++i) {
        const int32_t column = i / 4 * 8 + keys.column() + i % 2, kv_idx = kv + keys.row(i / 2 % 2);
        if (column >= args.shape.D_v || kv_idx < seen.begin || kv_idx >= seen.end) continue;
        const auto value = static_cast<float>(row[column]);
        if (!isfinite(value)) keys.dv[i] += value;
      }
    }
  }

  // Whether more is to be done about the step than the five products. Waits for its queries.
  __device__ __forceinline__ bool is_cut() const {
    if (marked) return true;
    wait(smem.q_full(stage_of(index)), phase_of(index));
    return step().cut != 0;
  }

  // Hands this warp's part of the last step's dQ to the DqWriter.
  __device__ __forceinline__ void hand_on(const typename Tile::Dq& dq) const {
    if (keys.warp() >= kConfig.dq_warps(group)) return;  // no such columns
    wait(smem.dq_empty(group), index % 2);
    if (speaks()) ptx::tma_store_wait_read<0>();  // the last dV
    __syncwarp();
    keys.store_dq(dq, smem.dq(4 * group + keys.warp()));
    ptx::fence_async_proxy();
    __syncwarp();
    release(smem.dq_full(group));
  }

  // A query tile. dQ is one step behind: by then the dS of the other group has long been there. In
  // the order in which the products are started each runs under the arithmetic that follows it:
  //     dP^T under the exponentials, dV, dQ and dK while dQ is handed on.
  // The first step computes a dQ of what lies there and drops it.
  //
  // There is a copy of the code for each stage, so that addresses of stages take no registers. No
  // product runs on from one copy into another: ptxas would serialize them.
  template <Steps kSteps, int kStage>
  __device__ __forceinline__ void run_step() {
    constexpr bool kCut = kSteps == Steps::cut;
    constexpr int kLast = kStage ^ 1;
    const uint32_t phase = phase_of(index);
    typename Tile::Pairs p, ds;  // S^T, then P^T; dP^T, then dS^T
    typename Tile::Rounded p_rounded, ds_rounded;
    wait(smem.q_full(kStage), phase);
    // In turns, so that one group has products while the other has exponentials.
    ptx::barrier_sync(kStepBarrier + group, kThreads);
    keys.start_pairs(p, rows_of(smem.k()), smem.q(kStage));
    start_weight_gradients(ds, kStage);
    ptx::wgmma_wait<1>();
    ptx::held(p);
    if (kCut && marked) keys.add_key_marks(p, smem.mark(64 * group));
    keys.weigh(p, call.factor_log2, smem.lse2(kStage));
    if constexpr (kCut) {
      keys.hide(p, call.args.mask, static_cast<int32_t>(call.args.shape.S_q),
                step().q_tile * kConfig.tile_m, tile().kv_begin + 64 * group);
    }
    // Here, not where dS is written: a loop between the exponentials and the wait for dP keeps
    // ptxas from moving all of them behind it.
    wait(smem.ds_empty(kStage), phase ^ 1);
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::held(ds);
    bool cleared = false;
    if constexpr (kCut) cleared = clear_nonfinite_queries(kStage);
    keys.subtract_delta(ds, p, smem.delta(kStage));
    if constexpr (kCut) keys.drop_without_weight(ds, p);
    keys.round(p_rounded, p);
    keys.round(ds_rounded, ds);
    keys.store_ds(ds_rounded, smem.ds(kStage) + group * kConfig.q_box_bytes());
    ptx::fence_async_proxy();
    __syncwarp();
    release(smem.ds_full(kStage));
    typename Tile::Dq dq;
    if constexpr (kConfig.dq_first) {
      start_last_dq(dq, kLast);
      keys.start_gradient(keys.dv, p_rounded, smem.dout(kStage));
      keys.start_gradient(keys.dk, ds_rounded, smem.q(kStage));
      ptx::wgmma_wait<2>();
      finish_last_dq(dq, kLast);
      ptx::wgmma_wait<1>();
      finish_dv(p_rounded, kStage, cleared);
    } else {
      keys.start_gradient(keys.dv, p_rounded, smem.dout(kStage));
      start_last_dq(dq, kLast);
      keys.start_gradient(keys.dk, ds_rounded, smem.q(kStage));
      ptx::wgmma_wait<1>();
      finish_dv(p_rounded, kStage, cleared);
      finish_last_dq(dq, kLast);
    }
    ptx::wgmma_wait<0>();
    ptx::held(keys.dk);
    ptx::held(ds_rounded);
    release(smem.q_empty(kStage));
    ++index;
    first = false;
  }
  // Starts dP^T = V dO^T.
  __device__ __forceinline__ void start_weight_gradients(typename Tile::Pairs& dp, int stage) {
    if (!kConfig.held_values && first) wait(smem.v_full(), tiles % 2);
    wait(smem.dout_full(stage), phase_of(index));
    if constexpr (kConfig.held_values) {
      keys.start_pairs_of_values(dp, smem.dout(stage));
    } else {
      keys.start_pairs(dp, rows_of(smem.v()), smem.dout(stage));
    }
  }
  // Lets the other group begin its step.
  __device__ __forceinline__ void pass_turn() const {
    ptx::barrier_arrive(kStepBarrier + (group ^ 1), kThreads);
  }

  // Starts dQ of the step before, which had the stage `last`.
  __device__ __forceinline__ void start_last_dq(typename Tile::Dq& dq, int last) const {
    if (!first) wait(smem.ds_full(last), phase_of(index - 1));
    keys.start_dq(dq, smem.k(), smem.ds(last), group);
  }
  // What is left to do once it is there.
  __device__ __forceinline__ void finish_last_dq(typename Tile::Dq& dq, int last) const {
    ptx::held(dq);
    if (first) return;
    release(smem.ds_empty(last));
    hand_on(dq);
  }
  // The same of dV += P^T dO; `cleared`: without the elements of dO that were Inf or NaN.
  __device__ __forceinline__ void finish_dv(typename Tile::Rounded& p_rounded, int stage,
                                            bool cleared) {
    ptx::held(keys.dv);
    ptx::held(p_rounded);
    release(smem.dout_empty(stage));
    if (cleared) add_nonfinite_dout();
  }
  // Whether the next step, up to `end`, is one for the same code; what is read anew has no
  // register.
  template <Steps kSteps>
  __device__ __forceinline__ bool goes_on(uint32_t end) const {
    if constexpr (kConfig.masked) {
      // The step that ends knows: so nobody waits here for the queries of the next.
      const int32_t next = smem.step(index - 1).next;
      return next >= 0 && (marked || next != 0) == (kSteps == Steps::cut);
    }
    return index < (kConfig.boxes() > 1 ? tile().end : end);
  }
  template <Steps kSteps>
  __device__ __forceinline__ void run_steps(uint32_t end) {
#pragma unroll 1
    do {
      if (stage_of(index) == 0) {
        run_step<kSteps, 0>();
      } else {
        run_step<kSteps, 1>();
      }
    } while (goes_on<kSteps>(end));
  }

  __device__ __forceinline__ void run() {
    if (group == 1) pass_turn();
#pragma unroll 1
    for (;; ++tiles) {
      wait(smem.k_full(), tiles % 2);
      const int32_t steps = tile().steps;
      if (steps < 0) break;
      clear_gradients();
      if (steps > 0) run_tile(index + steps);
      store();
    }
    if (speaks()) ptx::tma_store_wait_read<0>();  // shared memory must outlive the stores
  }
  __device__ __forceinline__ void clear_gradients() {
#pragma unroll
    for (int i = 0; i < Tile::kGradients; ++i) keys.dk[i] = keys.dv[i] = 0;
  }
  // The steps up to `end`.
  __device__ __forceinline__ void run_tile(uint32_t end) {
    first = true;
    if constexpr (kConfig.masked) mark_nonfinite_keys();
    if constexpr (kConfig.held_values) {
      wait(smem.v_full(), tiles % 2);
      keys.load_values(rows_of(smem.v()));
    }
    if constexpr (!kConfig.masked) {
      run_steps<Steps::plain>(end);
    } else {
#pragma unroll 1
      while (index < end) {
        if (is_cut()) {
          run_steps<Steps::cut>(end);
        } else {
          run_steps<Steps::plain>(end);
        }
      }
    }
    const int last = stage_of(index - 1);
    typename Tile::Dq dq;
    start_last_dq(dq, last);
    ptx::wgmma_wait<0>();
    finish_last_dq(dq, last);
  }

  // dK and dV leave through the places of dS and dQ, while the next keys and values come.
  __device__ __forceinline__ void store() const {
    const int warp = 4 * group + keys.warp();
    const KeyTile of = tile();
    __syncwarp();
    release(smem.kv_empty());
    wait_for_consumers();  // nobody reads dS any more
    keys.store_gradient(keys.dk, static_cast<float>(call.args.factor), smem.ds_of_warp(warp));
    send(call.dk, call.args.dk, smem.ds_of_warp(warp), of, 16 * warp);
    wait(smem.dq_empty(group), index % 2 ^ 1);  // the last dQ has been read
    keys.store_gradient(keys.dv, 1, smem.dq(warp));
    send(call.dv, call.args.dv, smem.dq(warp), of, 16 * warp);
    if (speaks()) ptx::tma_store_wait_read<1>();  // dK has been read
    wait_for_consumers();
  }
  __device__ __forceinline__ void send(const TensorBox& box, const View& view, uint32_t source,
                                       const KeyTile& of, int32_t row) const {
    ptx::fence_async_proxy();
    __syncwarp();
    if (!speaks()) return;
    if (view.data != nullptr) {
#pragma unroll
      for (int c = 0; c < kConfig.boxes(); ++c) {
        ptx::tma_store(box.map, source + c * 16 * BackwardConfig::kRowBytes,
                       c * BackwardConfig::kColumns, of.kv_begin + row, of.h_kv * box.step_h,
                       of.b * box.step_b);
      }
    }
    ptx::tma_store_commit();
  }
};

}  // namespace online_attention::cuda::hopper
