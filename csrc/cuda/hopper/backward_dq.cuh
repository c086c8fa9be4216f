// SPDX-License-Identifier: BSD-3-Clause
// dQ: a warp for each group of consumers adds what the group computed to the sums in memory, and
// finishes the gradient where all others have added.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/hopper/backward_loader.cuh"
#include "cuda/hopper/product.cuh"
#include "cuda/ptx/global.cuh"
#include "cuda/ptx/stmatrix.cuh"

namespace online_attention::cuda::hopper {

// Key tiles add in any order to sums that are 0 at the start. Or in ascending order: then of those
// that see a query tile the first one stores, and each waits for the one before, which began
// earlier (BackwardLoader::first_index). So a block waits only for blocks that run: nothing hangs,
// however few there is room for. dQ is made of the sums by a kernel behind (finish_dq), or by the
// last to add, which reads them, adds in its registers, scales, rounds and writes.
template <typename Element, BackwardConfig kConfig>
struct DqWriter {
  static constexpr int kRoundedBytes = kConfig.dq_queries() * kDqColumns * 2;  // of a warp's dQ

  const BackwardCall& call;
  const BackwardMap<kConfig>& smem;
  uint32_t phases = 0;  // bits 0 and 1: of the tasks, of which bit 0 counts dQ too; bit 31: of sums

  // Read anew at every call: there are few registers.
  __device__ __forceinline__ static uint32_t lane() { return ptx::thread_index() % 32u; }
  __device__ __forceinline__ static int group() {
    return static_cast<int>(ptx::thread_index() / 32u) - 2;
  }
  __device__ __forceinline__ static bool speaks() { return lane() == 0; }

  // How many have added to a group's part of a query tile, and to where.
  __device__ __forceinline__ int32_t* added(const DqTask& task) const {
    return call.buffers.added + counter_place(task.index, group());
  }
  __device__ __forceinline__ float* sums(const DqTask& task) const {
    return call.buffers.dq_sums + uint64_t{task.index} * kConfig.dq_floats() +
           group() * kConfig.dq_warp_bytes();  // of 4 warps, in floats
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;; ++phases) {
      wait(smem.task_full(phases), phases / BackwardConfig::kTasks % 2);
      const DqTask& task = smem.task(phases);  // read where it is needed: there are few registers
      if (task.last < 0) break;
      if (speaks() && task.place > 0) {
        // A pause: asking all the time slows those down who are to add.
        while (ptx::load_acquire(added(task)) != task.place) __nanosleep(64);
      }
      __syncwarp();
      if (finishes(task)) prepare_sums(task);
      wait(smem.dq_full(group()), phases % 2);
      if (finishes(task)) {
        finish(task);
      } else if (speaks()) {
        add(task);
      }
      __syncwarp();
      if (speaks()) ptx::mbarrier_arrive(smem.task_empty(phases));
    }
    if (speaks()) ptx::tma_store_wait_read<0>();  // shared memory must outlive the stores
  }

  // Whether nobody else adds; calls without a mask have a kernel for what is left to do then.
  __device__ __forceinline__ static bool finishes(const DqTask& task) {
    return kConfig.masked && task.place == task.last;
  }

  // One thread.
  __device__ __forceinline__ void add(const DqTask& task) const {
    const uint32_t source = smem.dq(4 * group()), bytes = kConfig.dq_group_bytes(group());
    ptx::fence_async_proxy_global();
    if (task.place == 0) {
      ptx::bulk_store(sums(task), source, bytes);
    } else {
      ptx::bulk_reduce_add(sums(task), source, bytes);
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
    ptx::mbarrier_arrive(smem.dq_empty(group()));
    if (task.place < 0) return;
    ptx::tma_store_wait<0>();
    ptx::fence_async_proxy_global();
    ptx::release_add(added(task), 1);
  }

  // Starts to bring the sums, to which all others have added, or zeros if there is nobody else.
  __device__ __forceinline__ void prepare_sums(const DqTask& task) const {
    if (speaks()) ptx::tma_store_wait_read<0>();  // of what was finished last
    __syncwarp();
    const int bytes = kConfig.dq_group_bytes(group());
    if (task.last == 0) {
      constexpr uint32_t kZeros[4] = {};
#pragma unroll 1
      for (int i = lane() * 16; i < bytes; i += 512) {
        ptx::store_shared(smem.sums(group()) + i, kZeros);
      }
    } else if (speaks()) {
      ptx::fence_async_proxy_global();
      ptx::mbarrier_arrive_expect(smem.sums_full(group()), bytes);
      ptx::bulk_load(smem.sums(group()), sums(task), bytes, smem.sums_full(group()));
    }
  }

  // (E30) Scales, rounds and writes dQ. Rounded rows of 16 columns take the place of sums that have
  // been read.
  __device__ __forceinline__ void finish(const DqTask& task) {
    if (task.last > 0) {
      wait(smem.sums_full(group()), phases >> 31);
      phases ^= 1u << 31;
    }
    __syncwarp();
    const auto factor = static_cast<float>(call.args.factor);
    const uint32_t row = (lane() / 16 * 8 + lane() % 8) * (kDqColumns * 2) + lane() / 8 % 2 * 16;
    constexpr uint32_t kToSums = kConfig.sums_offset() - kConfig.dq_offset();
    uint32_t own = smem.dq(4 * group()) + lane() * 16;
    uint32_t rounded = smem.sums(group()) + row;
#pragma unroll 1
    for (int n = kConfig.dq_warps(group()) * kConfig.dq_queries() / 16; n > 0; --n) {
      uint32_t words[4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        uint32_t x[4], y[4];
        ptx::load_shared(x, own + e * 512);
        ptx::load_shared(y, own + e * 512 + kToSums);
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i] = (__uint_as_float(y[i]) + __uint_as_float(x[i])) * factor;
        }
        words[2 * e] = pack_pair<Element>(sum[0], sum[1]);
        words[2 * e + 1] = pack_pair<Element>(sum[2], sum[3]);
      }
      ptx::stmatrix_x4_trans(rounded, words);
      own += 1024;
      rounded += 512;
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (!speaks()) return;
    if (call.args.dq.data != nullptr) store(task);
    ptx::mbarrier_arrive(smem.dq_empty(group()));
  }
  __device__ __forceinline__ void store(const DqTask& task) const {
    const int32_t column = kConfig.boxes() == 1 ? 0 : group() * BackwardConfig::kColumns;
    const int32_t row = kConfig.boxes() == 1 ? group() * kConfig.dq_queries() : 0;
#pragma unroll 1
    for (int w = 0; w < kConfig.dq_warps(group()); ++w) {
      ptx::tma_store(call.dq.map, smem.sums(group()) + w * kRoundedBytes, column + w * kDqColumns,
                     task.q_begin + row, task.h * call.dq.step_h, task.b * call.dq.step_b);
    }
    ptx::tma_store_commit();
  }
};

}  // namespace online_attention::cuda::hopper
