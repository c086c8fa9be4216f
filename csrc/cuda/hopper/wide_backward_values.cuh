// SPDX-License-Identifier: BSD-3-Clause
// The warpgroup of the backward for wide heads that computes P and holds dV.
#pragma once

#include "cuda/hopper/wide_backward_role.cuh"
#include "cuda/ptx/cluster.cuh"

namespace online_attention::cuda::hopper {

template <typename Element, WideBackwardConfig kConfig>
struct WideBackwardValues : WideBackwardRole<Element, kConfig> {
  using Role = WideBackwardRole<Element, kConfig>;
  using Role::at, Role::call, Role::marked, Role::pair, Role::release, Role::smem, Role::step;
  using typename Role::KeyRows, typename Role::Pairs, typename Role::Rounded;
  using typename Role::Map;
  using Gradient = WideGradient<kConfig.value_dim>;

  Gradient dv;

  __device__ __forceinline__ WideBackwardValues(const WideBackwardCall& call,
                                                const typename Role::Map& smem)
      : Role(call, smem, 0) {}

  // (E25) 2^15 P from the scores, in place.
  __device__ __forceinline__ void weigh(Pairs& p) const {
#pragma unroll
    for (int n = 0; n < Role::kTileM / 8; n += 2) {
      float terms[4];
      KeyRows::load_terms(terms, smem.lse2(at.stage), n);
#pragma unroll
      for (float& term : terms) term -= kWeightLog2;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = p[4 * n + i];
        // At most 1, whatever the rounding of a huge lse.
        x = exp2_of(min_or_nan(x * call.factor_log2 - terms[i / 4 * 2 + i % 2], kWeightLog2));
      }
    }
  }
  // Hands P to the other warpgroup, each thread to the one of the same number.
  __device__ __forceinline__ void give(const Pairs& p) {
    const int warp = Role::warp();
    while (!ptx::mbarrier_try_wait_in_cluster(smem.pairs_empty(pair.stage), pair.phase ^ 1)) {
    }
    const uint32_t place = smem.pairs(pair.stage) + ptx::thread_index() % 128u * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = pack_pair<__half>(p[8 * i + 2 * w], p[8 * i + 2 * w + 1]);
      }
      ptx::store_shared(place + i * 2048, words);
    }
    release(smem.p_full(pair.stage, warp));
    pair.advance();
  }
  // Adds Inf and NaN elements of dO, which dV sees as zeros, to the keys that their rows see. Exact
  // weights are positive, so the sum is what the weighted one would be.
  __device__ __forceinline__ void add_nonfinite_dout() {
    const BackwardArgs& args = call.args;
    const KeyTile& of = smem.tile();
    const int32_t q_begin = step.q_tile * Role::kTileM;
    const int32_t q_end = min(q_begin + Role::kTileM, static_cast<int32_t>(args.shape.S_q));
#pragma unroll 1
    for (int32_t q_idx = q_begin; q_idx < q_end; ++q_idx) {
      const Element* row = args.dout.row<const Element>(of.b, step.h, q_idx);
      const KvRange seen = args.mask.kv_range(q_idx, q_idx + 1);
#pragma unroll
      for (int i = 0; i < kConfig.value_dim / 2; ++i) {
        const int32_t column = i / 4 * 8 + Role::column() + i % 2;
        const int32_t kv_idx = of.kv_begin + Role::row(i / 2 % 2);
        if (column >= args.shape.D_v || kv_idx < seen.begin || kv_idx >= seen.end) continue;
        const auto value = static_cast<float>(row[column]);
        if (!isfinite(value)) dv.part[i / Gradient::kSize][i % Gradient::kSize] += value;
      }
    }
  }

  __device__ __forceinline__ void run_steps(int32_t steps) {
    Rounded p_rounded;  // the A operand of the last dV += P^T dO
    int last = 0;       // the stage of the step before
#pragma unroll 1
    for (int32_t i = 0; i < steps; ++i) {
      Pairs p;
      wait(smem.q_full(at.stage), at.phase);
      start_rows_by_rows<Element, kConfig.head_dim, Role::kBox, Role::kBox>(
          p, Map::operand(smem.k()), Map::operand(smem.q(at.stage)));
      if constexpr (kConfig.dv_runs_on) {
        ptx::wgmma_wait<1>();
        dv.hold();
        ptx::held(p_rounded);
        if (i > 0) release(smem.dout_empty(last));
      }
      ptx::wgmma_wait<0>();
      ptx::held(p);
      const bool cut = Role::is_cut();
      if (kConfig.masked && marked) KeyRows::add_key_marks(p, smem.mark(0));
      weigh(p);
      if (cut) {
        Role::hide(p);
        if (call.args.mask.is_banded() && Role::clear_nonfinite_queries()) add_nonfinite_dout();
      }
      release(smem.q_empty(at.stage));
      give(p);
      KeyRows::round(p_rounded, p);
      wait(smem.dout_full(at.stage), at.phase);
      Role::start_gradient(dv, p_rounded, smem.dout(at.stage));
      last = at.stage;
      if constexpr (!kConfig.dv_runs_on) finish(p_rounded, last);
      at.advance();
      step.template advance<kConfig.masked>(call, smem.tile());
    }
    if constexpr (kConfig.dv_runs_on) finish(p_rounded, last);
    wait_for_release(last);
  }
  __device__ __forceinline__ void finish(Rounded& p_rounded, int stage) {
    ptx::wgmma_wait<0>();
    dv.hold();
    ptx::held(p_rounded);
    release(smem.dout_empty(stage));
  }
  // Of the last step's dO by everybody: dV leaves through its place.
  __device__ __forceinline__ void wait_for_release(int last) const {
    // `at` is one place behind: its phase is the last step's unless it has just wrapped.
    wait(smem.dout_empty(last), at.stage == 0 ? at.phase ^ 1 : at.phase);
  }

  __device__ __forceinline__ void run() {
    dv.clear();
    const int32_t steps = smem.tile().steps;
    int last = 0;
    if (steps > 0) {
      wait(smem.k_full(), 0);
      if (kConfig.masked && call.args.mask.is_banded()) Role::mark_nonfinite_keys();
      run_steps(steps);
      last = at.stage == 0 ? kConfig.stages - 1 : at.stage - 1;
    }
    Role::store(dv, 1 / kWeightUnit, call.dv, call.args.dv, smem.dout(last));
  }
};

}  // namespace online_attention::cuda::hopper
