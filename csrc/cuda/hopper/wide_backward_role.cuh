// SPDX-License-Identifier: BSD-3-Clause
// What the warpgroups of the backward for wide heads that hold dV and dK have in common: the walk
// over the steps, and what a mask asks for besides the products.
#pragma once

#include "cuda/hopper/backward_tile.cuh"
#include "cuda/hopper/producer.cuh"
#include "cuda/hopper/wide_backward_loader.cuh"
#include "cuda/ptx/barrier.cuh"

namespace online_attention::cuda::hopper {

// A gradient of `kColumns` columns in registers. ptxas takes no product with 128 accumulators in a
// kernel that starts with 128 registers a thread, so there may be two.
template <int kColumns>
struct WideGradient {
  static constexpr int kParts = kColumns > 192 ? 2 : 1;
  static constexpr int kPartColumns = kColumns / kParts, kPartBoxes = kPartColumns / 64;
  static constexpr int kSize = kPartColumns / 2;
  float part[kParts][kSize];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& x : part) {
#pragma unroll
      for (float& y : x) y = 0;
    }
  }
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (auto& x : part) ptx::held(x);
  }
};

// P travels between the warpgroups as fp16, and as a factor of dV, times this: the largest is 2^15,
// and what underflows is below 2^-39.
inline constexpr float kWeightLog2 = 15, kWeightUnit = 1 << 15;

template <typename Element, WideBackwardConfig kConfig>
struct WideBackwardRole : WarpgroupThread {
  using Map = WideBackwardMap<kConfig>;
  using KeyRows = BackwardTile<Element, kConfig.tile(kConfig.head_dim)>;
  using Pairs = typename KeyRows::Pairs;
  using Rounded = typename KeyRows::Rounded;
  static constexpr int kTileM = WideBackwardConfig::tile_m;
  static constexpr int kBox = WideBackwardConfig::kBoxBytes;
  static constexpr int kThreads = 256;  // of the two warpgroups

  const WideBackwardCall& call;
  const Map& smem;
  int role;  // 0: the one that holds dV; 1: dK
  WideBackwardStep step;
  bool marked = false;  // whether some key of the block held Inf or NaN
  typename Map::QueryPlace at;
  typename Map::PairPlace pair;

  __device__ __forceinline__ WideBackwardRole(const WideBackwardCall& call, const Map& smem,
                                              int role)
      : call(call), smem(smem), role(role), step(call, smem.tile()) {}

  __device__ __forceinline__ static bool speaks() { return threadIdx.x % 32u == 0; }
  // What the whole warp has done before is done for whoever waits.
  __device__ __forceinline__ static void release(uint32_t barrier) {
    __syncwarp();
    if (speaks()) ptx::mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ int thread() const {  // of both warpgroups'
    return static_cast<int>(ptx::thread_index() % 128u) + 128 * role;
  }
  __device__ __forceinline__ static void wait_for_both() {
    ptx::barrier_sync(kConsumersBarrier, kThreads);
  }

  // Whether more is to be done about the step than the five products.
  __device__ __forceinline__ bool is_cut() const {
    if constexpr (!kConfig.masked) return false;
    const KeyTile& of = smem.tile();
    const int32_t q_begin = step.q_tile * kTileM;
    return marked || q_begin < of.plain_begin || q_begin + kTileM > of.plain_end;
  }
  __device__ __forceinline__ void hide(Pairs& pairs) const {
    KeyRows::hide(pairs, call.args.mask, static_cast<int32_t>(call.args.shape.S_q),
                  step.q_tile * kTileM, smem.tile().kv_begin);
  }

  // As BackwardConsumer's, whose comments say why: keys that hold Inf or NaN are cleared and
  // marked.
  __device__ __forceinline__ void mark_nonfinite_keys() {
    const int i = thread();
    if (i < WideBackwardConfig::kTileN) ptx::store_shared(smem.mark(i), 0u);
    wait_for_both();
    constexpr uint32_t kStep = kThreads * 16;
    const uint32_t begin = smem.k() + i * 16, end = smem.k() + kConfig.q_bytes();
    if (has_nonfinite<Element>(begin, end, kStep)) {
#pragma unroll 1
      for (uint32_t address = begin; address < end; address += kStep) {
        if (!has_nonfinite<Element>(address, address + 16, 16)) continue;
        ptx::store_shared(smem.mark((address - smem.k()) / kConfig.kRowBytes % 64), 0x7fffffffu);
      }
      clear_nonfinite<Element>(begin, end, kStep);
    }
    const uint32_t other = smem.other_k() + i * 16, other_end = smem.q(0);
    if (has_nonfinite<Element>(other, other_end, kStep)) {
      clear_nonfinite<Element>(other, other_end, kStep);
    }
    wait_for_both();
    const uint32_t marks =
        ptx::load_shared(smem.mark(lane())) | ptx::load_shared(smem.mark(lane() + 32));
    marked = __any_sync(0xffffffffu, marks != 0);
  }
  // And so are queries and dO of a step that the mask cuts, once both have read them as they are.
  // Returns whether dO may have had such elements. No product must be running.
  __device__ __forceinline__ bool clear_nonfinite_queries() const {
    wait(smem.q_full(at.stage), at.phase);
    wait(smem.dout_full(at.stage), at.phase);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kTileM; i += 32) {
      const uint32_t place = 4 * (i + lane());
      finite &= isfinite(__uint_as_float(ptx::load_shared(smem.lse2(at.stage) + place))) &&
                isfinite(__uint_as_float(ptx::load_shared(smem.delta(at.stage) + place)));
    }
    if (__all_sync(0xffffffffu, finite)) return false;  // every warp sees all terms
    wait_for_both();
    constexpr uint32_t kStep = kThreads * 16;
    const uint32_t q = smem.q(at.stage), dout = smem.dout(at.stage), first = thread() * 16;
    clear_nonfinite<Element>(q + first, q + kConfig.q_bytes(), kStep);
    clear_nonfinite<Element>(dout + first, dout + kConfig.dout_bytes(), kStep);
    wait_for_both();
    return true;
  }

  // Starts gradient += A B, B the queries of a step or their dO.
  template <int kColumns>
  __device__ __forceinline__ static void start_gradient(WideGradient<kColumns>& gradient,
                                                        Rounded& a, uint32_t b) {
    using Gradient = WideGradient<kColumns>;
#pragma unroll
    for (int i = 0; i < Gradient::kParts; ++i) {
      start_registers_by_columns<Element, kTileM, kBox>(
          gradient.part[i], a, Map::operand(b) + i * Gradient::kPartBoxes * kBox);
    }
  }
  // The warp's 16 rows of a gradient, by way of shared memory that nobody reads any more.
  template <int kColumns>
  __device__ __forceinline__ void store(const WideGradient<kColumns>& gradient, float factor,
                                        const TensorBox& box, const View& view,
                                        uint32_t target) const {
    using Gradient = WideGradient<kColumns>;
    using Rows = BackwardTile<Element, kConfig.tile(Gradient::kPartColumns)>;
    constexpr int kBoxes = kColumns / 64;
    if (view.data == nullptr) return;
    target += warp() * kBoxes * 16 * WideBackwardConfig::kRowBytes;
#pragma unroll
    for (int i = 0; i < Gradient::kParts; ++i) {
      Rows::store_gradient(gradient.part[i], factor,
                           target + i * Gradient::kPartBoxes * 16 * WideBackwardConfig::kRowBytes);
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (!speaks()) return;
    const KeyTile& of = smem.tile();
#pragma unroll
    for (int c = 0; c < kBoxes; ++c) {
      ptx::tma_store(box.map, target + c * 16 * WideBackwardConfig::kRowBytes,
                     c * WideBackwardConfig::kColumns, of.kv_begin + 16 * warp(),
                     of.h_kv * box.step_h, of.b * box.step_b);
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();  // shared memory must outlive the stores
  }
};

}  // namespace online_attention::cuda::hopper
