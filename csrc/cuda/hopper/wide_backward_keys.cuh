// SPDX-License-Identifier: BSD-3-Clause
// The warpgroup of the backward for wide heads that computes dS and holds dK.
#pragma once

#include "cuda/hopper/wide_backward_role.cuh"

namespace online_attention::cuda::hopper {

inline constexpr int kKeysBarrier = 2;  // a named barrier, of this warpgroup

template <typename Element, WideBackwardConfig kConfig>
struct WideBackwardKeys : WideBackwardRole<Element, kConfig> {
  using Role = WideBackwardRole<Element, kConfig>;
  using Role::at, Role::call, Role::pair, Role::release, Role::smem, Role::step;
  using typename Role::KeyRows, typename Role::Pairs, typename Role::Rounded;
  using typename Role::Map;

  WideGradient<kConfig.head_dim> dk;

  __device__ __forceinline__ WideBackwardKeys(const WideBackwardCall& call,
                                              const typename Role::Map& smem)
      : Role(call, smem, 1) {}

  // (E29) dS = P (dP - delta), in place of dP, from 2^15 P of the other warpgroup.
  __device__ __forceinline__ void weigh(Pairs& ds) const {
    const int warp = Role::warp();
    wait(smem.p_full(pair.stage, warp), pair.phase);
    const uint32_t place = smem.pairs(pair.stage) + ptx::thread_index() % 128u * 16;
#pragma unroll
    for (int n = 0; n < Role::kTileM / 8; n += 2) {
      float terms[4];
      KeyRows::load_terms(terms, smem.delta(at.stage), n);
#pragma unroll
      for (float& term : terms) term /= -kWeightUnit;
      uint32_t words[4];
      ptx::load_shared(words, place + n * 1024);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 p = __half22float2(reinterpret_cast<const __half2&>(words[w]));
        float &even = ds[4 * n + 2 * w], &odd = ds[4 * n + 2 * w + 1];
        even = p.x * fmaf(even, 1 / kWeightUnit, terms[w / 2 * 2]);
        odd = p.y * fmaf(odd, 1 / kWeightUnit, terms[w / 2 * 2 + 1]);
      }
    }
  }

  __device__ __forceinline__ void run_steps(int32_t steps) {
    Rounded ds_rounded;  // the A operand of the last dK += dS^T Q
    int last = 0;        // the stage of the step before
#pragma unroll 1
    for (int32_t i = 0; i < steps; ++i) {
      Pairs ds;
      wait(smem.dout_full(at.stage), at.phase);
      start_rows_by_rows<Element, kConfig.value_dim, Role::kBox, Role::kBox>(
          ds, Map::operand(smem.v()), Map::operand(smem.dout(at.stage)));
      if constexpr (kConfig.dk_runs_on) {
        ptx::wgmma_wait<1>();
        dk.hold();
        ptx::held(ds_rounded);
        if (i > 0) release(smem.q_empty(last));
      }
      ptx::wgmma_wait<0>();
      ptx::held(ds);
      const bool cut = Role::is_cut();
      if (cut && call.args.mask.is_banded()) Role::clear_nonfinite_queries();
      weigh(ds);
      if (cut) Role::hide(ds);  // what is hidden may have a dP that is Inf or NaN
      release(smem.dout_empty(at.stage));
      KeyRows::round(ds_rounded, ds);
      ptx::barrier_sync(kKeysBarrier, 128);  // all have read P, whose place dS takes
      KeyRows::store_ds(ds_rounded, smem.pairs(pair.stage));
      ptx::fence_async_proxy();
      release(smem.ds_full(pair.stage));
      wait(smem.q_full(at.stage), at.phase);
      Role::start_gradient(dk, ds_rounded, smem.q(at.stage));
      last = at.stage;
      if constexpr (!kConfig.dk_runs_on) finish(ds_rounded, last);
      at.advance();
      pair.advance();
      step.template advance<kConfig.masked>(call, smem.tile());
    }
    if constexpr (kConfig.dk_runs_on) finish(ds_rounded, last);
    // Of the last step's Q by everybody: dK leaves through its place.
    wait(smem.q_empty(last), at.stage == 0 ? at.phase ^ 1 : at.phase);
  }

  __device__ __forceinline__ void finish(Rounded& ds_rounded, int stage) {
    ptx::wgmma_wait<0>();
    dk.hold();
    ptx::held(ds_rounded);
    release(smem.q_empty(stage));
  }
  __device__ __forceinline__ void run() {
    dk.clear();
    const int32_t steps = smem.tile().steps;
    int last = 0;
    if (steps > 0) {
      wait(smem.k_full(), 0);
      if (kConfig.masked && call.args.mask.is_banded()) Role::mark_nonfinite_keys();
      wait(smem.v_full(), 0);
      run_steps(steps);
      last = at.stage == 0 ? kConfig.stages - 1 : at.stage - 1;
    }
    Role::store(dk, static_cast<float>(call.args.factor), call.dk, call.args.dk, smem.q(last));
  }
};

}  // namespace online_attention::cuda::hopper
