// SPDX-License-Identifier: BSD-3-Clause
// Backward attention of 16-bit types on tensor cores through mma.sync: five products in one pass
// (FlashAttention-2, section 3.1.2, with dQ one step behind).
//
// A block owns tile_n keys: K and V stay in shared memory, dK and dV in registers. For each tile of
// queries it computes S^T and dP^T with keys as rows, so that P^T and dS^T are stored as they are
// computed and read as the left operand of dV and dK. dQ = dS K needs the dS of all keys of the
// block: it is computed one step later, behind the barrier that the next step needs anyway, and
// added to fp32 sums in global memory. A step has that one barrier for the block, and one for the
// warps that share keys.
//
// Shared memory: K, V, Q and dO (`stages` times each), P^T, dS^T (twice), terms of the query rows
// (twice: lse in base-2 units, then delta), marks of the keys.
#pragma once

#include "cuda/backward_plan.h"
#include "cuda/portable/backward_pairs.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/global.cuh"

namespace online_attention::cuda::portable {

// One step of a block: a query tile of one head of the group.
struct QueryStep {
  int32_t head, q_tile;  // head counts within the group
};

// kModified: whether the call may have a bias or dropout.
template <typename Element, BackwardConfig kConfig, bool kModified>
struct BackwardBlock : BackwardTile<Element, kConfig> {
  using Base = BackwardTile<Element, kConfig>;
  using Pairs = BackwardPairs<Element, kConfig>;
  using Base::call;
  static constexpr int kThreads = kConfig.threads();

  // What a step's addresses start from is kept in shared memory: it is needed once a step, and
  // registers are for fragments. The range of query tiles that see some key of the block, batch
  // element and head; for the first query head of the group its rows of q and dout, its first row
  // of lse and its first tile of dQ.
  enum Place : int {
    kQTileBegin = 0,
    kQTileEnd = 4,
    kBatch = 8,
    kKvHead = 12,
    kQRows = 16,
    kDoutRows = 24,
    kRow = 32,
    kDqTile = 40,
    kKvBegin = 48
  };

  __device__ __forceinline__ BackwardBlock(const BackwardCall& call, uint32_t smem)
      : Base(call, smem) {
    const BackwardCoord at = call.plan.locate(ticket(call));
    const int32_t kv_begin = at.kv_tile * kConfig.tile_n;
    const QRange queries = call.args.mask.q_range(kv_begin, kv_begin + kConfig.tile_n,
                                                  static_cast<int32_t>(call.args.shape.S_q));
    if (threadIdx.x == 0) {
      const int64_t h = int64_t{at.h_kv} * call.plan.group, head = at.b * call.args.shape.H + h;
      put(kQTileBegin, queries.begin / kConfig.tile_m);
      put(kQTileEnd, ceil_div(queries.end, kConfig.tile_m));
      put(kKvBegin, kv_begin);
      put(kBatch, at.b);
      put(kKvHead, at.h_kv);
      put(kQRows, call.args.q.template row<Element>(at.b, h, 0));
      put(kDoutRows, call.args.dout.template row<Element>(at.b, h, 0));
      put(kRow, head * call.args.shape.S_q);
      put(kDqTile, head * call.plan.q_tiles);
    }
    __syncthreads();
  }
  template <typename T>
  __device__ __forceinline__ void put(Place what, T value) const {
    const uint32_t address = this->place_smem() + what;
    if constexpr (sizeof(T) == 4) {
      ptx::store_shared(address, static_cast<uint32_t>(value));
    } else {
      const auto bits = reinterpret_cast<const uint64_t&>(value);
      ptx::store_shared(address, static_cast<uint32_t>(bits));
      ptx::store_shared(address + 4, static_cast<uint32_t>(bits >> 32));
    }
  }
  __device__ __forceinline__ int32_t place(Place what) const {
    return static_cast<int32_t>(ptx::load_shared(this->place_smem() + what));
  }
  __device__ __forceinline__ int64_t index_at(Place what) const {
    uint32_t words[2];
    ptx::load_shared(words, this->place_smem() + what);
    return static_cast<int64_t>(uint64_t{words[1]} << 32 | words[0]);
  }

  // Blocks that wait for others' sums take their places in the order in which they start, so that
  // whom they wait for is running.
  __device__ __forceinline__ static uint32_t ticket(const BackwardCall& call) {
    if (call.turns == nullptr) return blockIdx.x;
    __shared__ uint32_t place;
    if (threadIdx.x == 0) place = static_cast<uint32_t>(atomicAdd(call.turns, 1));
    __syncthreads();
    return place;
  }

  __device__ __forceinline__ int32_t kv_begin() const { return place(kKvBegin); }
  // The block's steps: heads of the group in turn, last tile first.
  __device__ __forceinline__ QueryStep first_step() const {
    const int32_t end = place(kQTileEnd);
    return {end > place(kQTileBegin) ? 0 : call.plan.group, end - 1};
  }
  __device__ __forceinline__ bool exists(const QueryStep& step) const {
    return step.head < call.plan.group;
  }
  __device__ __forceinline__ QueryStep after(const QueryStep& step) const {
    if (step.q_tile > place(kQTileBegin)) return {step.head, step.q_tile - 1};
    return {step.head + 1, place(kQTileEnd) - 1};
  }
  __device__ __forceinline__ QueryStep before(const QueryStep& step) const {
    if (step.q_tile < place(kQTileEnd) - 1) return {step.head, step.q_tile + 1};
    return {step.head - 1, place(kQTileBegin)};
  }

  __device__ __forceinline__ void load_keys(const View& view, uint32_t tile, int64_t length) const {
    const auto rows = this->source(view.row<const Element>(place(kBatch), place(kKvHead), 0),
                                   view.stride_s, call.args.shape.S_kv, length);
    load_tile<kConfig.head_dim, kConfig.tile_n, kThreads>(tile, rows, kv_begin());
  }
  // Rows of one query head of the group.
  __device__ __forceinline__ const Element* head_rows(Place first, const View& view,
                                                      int32_t head) const {
    return reinterpret_cast<const Element*>(index_at(first)) + head * view.stride_h;
  }
  __device__ __forceinline__ void load_rows(const QueryStep& step, Place first, const View& view,
                                            uint32_t tile, int64_t length) const {
    const auto rows =
        this->source(head_rows(first, view, step.head), view.stride_s, call.args.shape.S_q, length);
    load_tile<kConfig.head_dim, kConfig.tile_m, kThreads>(tile, rows, step.q_tile * kConfig.tile_m);
  }
  __device__ __forceinline__ void load_q(const QueryStep& step, int stage, int buffer) const {
    load_rows(step, kQRows, call.args.q, this->q_smem(stage), call.args.shape.D);
    load_row_terms(step, buffer);
  }
  __device__ __forceinline__ void load_dout(const QueryStep& step, int stage) const {
    load_rows(step, kDoutRows, call.args.dout, this->dout_smem(stage), call.args.shape.D_v);
  }
  __device__ __forceinline__ void load_queries(const QueryStep& step, int stage, int buffer) const {
    load_q(step, stage, buffer);
    load_dout(step, stage);
  }
  // K and Q first: the scores of the first step need not wait for V and dO.
  __device__ __forceinline__ void load_first(const QueryStep& step) const {
    load_keys(call.args.k, this->k_smem(), call.args.shape.D);
    load_q(step, 0, 0);
    ptx::cp_async_commit();
    load_keys(call.args.v, this->v_smem(), call.args.shape.D_v);
    load_dout(step, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
  }

  // Terms of the query rows: one thread in tile_m brings an lse, the next tile_m a delta. Rows that
  // do not exist are hidden; theirs is never used.
  __device__ __forceinline__ void load_row_terms(const QueryStep& step, int buffer) const {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    if (thread >= 2 * kConfig.tile_m) return;
    const int32_t q_idx = step.q_tile * kConfig.tile_m + thread % kConfig.tile_m;
    const int64_t row = index_at(kRow) + step.head * call.args.shape.S_q + q_idx;
    const float* terms = thread < kConfig.tile_m ? call.lse2 : call.delta;
    ptx::cp_async<4>(this->row_terms(buffer) + 4 * thread, terms + row,
                     q_idx < call.args.shape.S_q);
  }

  // (E30) for one query tile of the group, without the scale: dQ += dS K over this block's keys.
  __device__ __forceinline__ void add_dq(const QueryStep& step, int buffer) const {
    float dq[kConfig.dq_row_atoms][Base::kDqTiles][4] = {};
    this->multiply_ds_k(dq, buffer);
    const int64_t tile = index_at(kDqTile) + step.head * int64_t{call.plan.q_tiles} + step.q_tile;
    int32_t* turn = call.turns == nullptr ? nullptr : call.turns + 1 + tile;
    if (turn != nullptr) wait_for_turn(turn, step.q_tile);
    float* target = call.dq_sums + tile * (kConfig.tile_m * kConfig.head_dim) + threadIdx.x * 4;
#pragma unroll
    for (int atom = 0; atom < kConfig.dq_row_atoms; ++atom) {
#pragma unroll
      for (int n = 0; n < Base::kDqTiles; ++n) {
        ptx::reduce_add(target + (atom * Base::kDqTiles + n) * kThreads * 4, dq[atom][n]);
      }
    }
    if (turn != nullptr) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) ptx::release_add(turn, 1);
    }
  }
  __device__ __forceinline__ void wait_for_turn(const int32_t* turn, int32_t q_tile) const {
    if (threadIdx.x == 0) {
      const auto s_q = static_cast<int32_t>(call.args.shape.S_q);
      const int32_t mine =
          call.plan.turn_of(call.args.mask, s_q, q_tile, kv_begin() / kConfig.tile_n);
      while (ptx::load_acquire(turn) != mine) __nanosleep(20);
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool needs_mask(const QueryStep& step) const {
    const int32_t q_begin = step.q_tile * kConfig.tile_m, q_end = q_begin + kConfig.tile_m;
    const int32_t kv = kv_begin();
    return q_end > call.args.shape.S_q ||
           call.args.mask.tile_needs_mask(q_begin, q_end, kv, kv + kConfig.tile_n);
  }

  __device__ __forceinline__ bool has_bias() const { return kModified && call.args.bias.exists(); }
  __device__ __forceinline__ Pairs pairs_of(const QueryStep& step) const {
    return {call, place(kBatch), place(kKvHead) * call.plan.group + step.head,
            step.q_tile * kConfig.tile_m, kv_begin()};
  }

  // P and dS of one query tile, to shared memory.
  __device__ __forceinline__ void compute_pairs(const QueryStep& step, bool masked, bool first,
                                                int stage, int buffer) const {
    const int32_t q_begin = step.q_tile * kConfig.tile_m;
    float p[Base::kAtoms][Base::kQueryTiles][4] = {};
    this->multiply_k_q(p, stage);  // S^T = K Q^T
    if (has_bias()) {
      if (this->marked) this->add_key_marks(p);
      pairs_of(step).add_bias(p);
      this->template weigh<true>(p, buffer);
    } else {
      this->weigh(p, buffer);  // (E25)
    }
    if (kModified ? needs_mask(step) : masked) this->hide(p, q_begin, kv_begin());
    if (kModified && call.args.dropout.exists()) pairs_of(step).mark_dropped(p);
    if (call.args.dv.data != nullptr) this->template store_pairs<kModified>(p, this->p_smem());
    if (first) {
      ptx::cp_async_wait<kConfig.stages - 1>();  // but for what the next step needs
      __syncthreads();                           // V and dO are there
    }
    if (call.dq_sums == nullptr && call.args.dk.data == nullptr) return;
    float ds[Base::kAtoms][Base::kQueryTiles][4] = {};
    this->multiply_v_dout(ds, stage);  // (E27), transposed
    if constexpr (kModified) {
      pairs_of(step).subtract_delta(*this, ds, p, buffer);
    } else {
      this->subtract_delta(ds, p, buffer);  // (E29)
    }
    if (masked) this->drop_without_weight(ds, p);
    this->store_pairs(ds, this->ds_smem(buffer));
  }

  // dV and dK of one query tile.
  __device__ __forceinline__ void absorb_pairs(const QueryStep& step, bool masked, int stage,
                                               int buffer) {
    const int32_t q_begin = step.q_tile * kConfig.tile_m;
    bool cleared = false;
    if (masked) {
      // The barrier tells too that everybody has read Q and dO as they are.
      if (__syncthreads_or(!this->row_terms_finite(buffer)) != 0) {
        cleared = this->clear_nonfinite_queries(stage);
      }
    } else {
      this->wait_for_key_warps();
    }
    if (call.args.dv.data != nullptr) {
      this->multiply_p_dout(stage);  // (E26)
      if (cleared) {
        const auto hidden = [&](int32_t q_idx, int32_t kv_idx) {
          if (!has_bias()) return false;
          const Pairs pairs = pairs_of(step);
          return hides<Element>(call.args.bias, pairs.b, pairs.h, q_idx, kv_idx);
        };
        this->add_nonfinite_dout(head_rows(kDoutRows, call.args.dout, step.head), q_begin,
                                 kv_begin(), hidden);
      }
    }
    if (call.args.dk.data != nullptr) this->multiply_ds_q(stage, buffer);  // (E31), unscaled
  }

  __device__ __forceinline__ void run() {
    QueryStep step = first_step();
    if (!exists(step)) return;
    // Half of the warps begin a step with the dQ of the last, half with their scores: while one
    // half multiplies, the other takes exponentials. Where blocks wait for turns, all begin with
    // dQ.
    const bool dq_first = call.turns != nullptr || Base::column_warp() % 2 == 0;
    bool dq_open = false;  // whether the dQ of the last step is still to be computed
    bool first = true;
    int buffer = 0;
    load_first(step);
    if (call.args.mask.is_banded() || has_bias()) this->mark_nonfinite_keys();
#pragma unroll 1
    for (; exists(step); step = after(step)) {
      const int stage = kConfig.stages == 2 ? buffer : 0;
      if (!first) ptx::cp_async_wait<0>();
      __syncthreads();  // Q, dO and the row terms of this step are there; so is the dS of the last
      if constexpr (kConfig.stages == 2) {
        if (exists(after(step))) load_queries(after(step), stage ^ 1, buffer ^ 1);
        ptx::cp_async_commit();
      }
      const bool masked = has_bias() || needs_mask(step);
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        if ((part == 0) == dq_first) {
          if (dq_open) add_dq(before(step), buffer ^ 1);
        } else {
          compute_pairs(step, masked, first, stage, buffer);
        }
      }
      absorb_pairs(step, masked, stage, buffer);
      if constexpr (kConfig.stages == 1) {
        __syncthreads();  // Q and dO have been read
        if (exists(after(step))) load_queries(after(step), 0, buffer ^ 1);
        ptx::cp_async_commit();
      }
      buffer ^= 1;
      dq_open = call.dq_sums != nullptr;
      first = false;
    }
    __syncthreads();
    if (dq_open) add_dq(before(step), buffer ^ 1);
  }

  // dK and dV leave through the buffers of K and V, in 16-byte pieces.
  __device__ __forceinline__ void store() {
    __syncthreads();  // K and V have been read
    this->stage_rows(this->dk, this->k_smem(), static_cast<float>(call.args.factor));
    this->stage_rows(this->dv, this->v_smem(), kModified ? call.keep_scale : 1);
    __syncthreads();
    const auto rows = static_cast<int32_t>(call.args.shape.S_kv);
    const auto store_to = [&](const View& view, uint32_t tile, int64_t length) {
      if (view.data == nullptr) return;
      const RowTarget<Element> target{view.row<Element>(place(kBatch), place(kKvHead), 0),
                                      view.stride_s, rows, static_cast<int32_t>(length),
                                      call.aligned};
      store_tile<kConfig.head_dim, kConfig.tile_n, kThreads>(tile, target, kv_begin());
    };
    store_to(call.args.dk, this->k_smem(), call.args.shape.D);
    store_to(call.args.dv, this->v_smem(), call.args.shape.D_v);
  }
};

// A kernel's own template arguments must be types and integers, hence not a BackwardConfig.
// kModified: for calls with a bias or dropout; compiled apart, as in the forward.
template <typename Element, int kHeadDim, SmemClass kSize, bool kModified>
__global__ void __launch_bounds__((kBackward<kHeadDim, kSize>.threads()), 1)
    tensor_core_backward_kernel(const __grid_constant__ BackwardCall call) {
#if defined(__CUDA_ARCH__)
  if constexpr (runs_on(kSize, __CUDA_ARCH__)) {
    extern __shared__ __align__(128) unsigned char smem[];
    BackwardBlock<Element, kBackward<kHeadDim, kSize>, kModified> block(call,
                                                                        ptx::shared_address(smem));
    block.run();
    block.store();
  }
#endif
}

// Scales, rounds and writes dQ from its sums; a block per query tile, whose threads hold what they
// held in add_dq.
template <typename Element, int kHeadDim, SmemClass kSize>
__global__ void __launch_bounds__((kBackward<kHeadDim, kSize>.threads()))
    store_dq_kernel(const __grid_constant__ BackwardCall call) {
#if defined(__CUDA_ARCH__)
  if constexpr (runs_on(kSize, __CUDA_ARCH__)) {
    constexpr BackwardConfig kConfig = kBackward<kHeadDim, kSize>;
    using Tile = BackwardTile<Element, kConfig>;
    extern __shared__ __align__(128) unsigned char smem[];
    const Tile tile(call, ptx::shared_address(smem));
    const float* sums =
        call.dq_sums + int64_t{blockIdx.x} * (kConfig.tile_m * kConfig.head_dim) + threadIdx.x * 4;
    float dq[kConfig.dq_row_atoms][Tile::kDqTiles][4];
#pragma unroll
    for (int atom = 0; atom < kConfig.dq_row_atoms; ++atom) {
#pragma unroll
      for (int n = 0; n < Tile::kDqTiles; ++n) {
        const auto four = *reinterpret_cast<const float4*>(sums + (atom * Tile::kDqTiles + n) *
                                                                      kConfig.threads() * 4);
        dq[atom][n][0] = four.x;
        dq[atom][n][1] = four.y;
        dq[atom][n][2] = four.z;
        dq[atom][n][3] = four.w;
      }
    }
    tile.stage_dq(dq, ptx::shared_address(smem), static_cast<float>(call.args.factor));
    __syncthreads();
    const uint32_t head = blockIdx.x / call.plan.q_tiles;
    const auto H = static_cast<uint32_t>(call.args.shape.H);
    const View& view = call.args.dq;
    const RowTarget<Element> target{view.row<Element>(head / H, head % H, 0), view.stride_s,
                                    static_cast<int32_t>(call.args.shape.S_q),
                                    static_cast<int32_t>(call.args.shape.D), call.aligned};
    store_tile<kHeadDim, kConfig.tile_m, kConfig.threads()>(
        ptx::shared_address(smem), target,
        static_cast<int32_t>(blockIdx.x % call.plan.q_tiles) * kConfig.tile_m);
  }
#endif
}

}  // namespace online_attention::cuda::portable
