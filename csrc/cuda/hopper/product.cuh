// SPDX-License-Identifier: BSD-3-Clause
// A warpgroup's products: who holds which element, and the loops over the instructions that make a
// product of tiles. Forward and backward share it.
//
// Accumulator of m64nN (fp32, N / 2 registers): warp w, lane 4g + t holds in register 4n + 2h + j
//     row 16w + g + 8h, column 8n + 2t + j
// so a thread has two rows (h) and the four lanes of equal g (a quad) hold them whole. Registers
// 8k .. 8k + 7, rounded and paired, are the A operand of the k-th 16 columns: the result of one
// product goes into the next without leaving its thread.
//
// Tiles in shared memory are boxes of 64 columns (128 bytes a row, swizzled).
#pragma once

#include "cuda/ptx/special.cuh"
#include "cuda/ptx/wgmma_rs.cuh"
#include "cuda/ptx/wgmma_ss.cuh"

namespace online_attention::cuda::hopper {

// Of a thread in its warpgroup. Read anew at every call: addresses made of them would stay in
// registers all the time.
struct WarpgroupThread {
  __device__ __forceinline__ static int lane() {
    return static_cast<int>(ptx::thread_index() % 32u);
  }
  __device__ __forceinline__ static int warp() {
    return static_cast<int>(ptx::thread_index() / 32u % 4u);
  }
  // The row of register row h, of the warpgroup's 64; the first of this thread's columns.
  __device__ __forceinline__ static int row(int h) { return 16 * warp() + lane() / 4 + 8 * h; }
  __device__ __forceinline__ static int column() { return lane() % 4 * 2; }
};

// Describes a tile of rows of 128 bytes, swizzled as the copy engine leaves it, to wgmma: 1024
// bytes from 8 rows to the next 8; `box_bytes` from one box of 64 columns to the next, which counts
// only where the columns are the product's N.
__device__ __forceinline__ uint64_t smem_descriptor(uint32_t address, uint32_t box_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | (uint64_t{box_bytes >> 4} << 16) | (address >> 4);
}

// Starts D = A B^T: rows of A and rows of B, `kDepth` columns of each, whose boxes are that many
// bytes apart.
template <typename Element, int kDepth, int kBoxA, int kBoxB, int kSize>
__device__ __forceinline__ void start_rows_by_rows(float (&d)[kSize], uint32_t a, uint32_t b) {
  const uint64_t a_tile = smem_descriptor(a, 0), b_tile = smem_descriptor(b, 0);
  ptx::held(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const int box = step / 4, in_box = step % 4 * 2;  // in units of 16 bytes
    ptx::wgmma_ss<Element, ptx::Major::k, ptx::Major::k>(
        d, a_tile + box * (kBoxA / 16) + in_box, b_tile + box * (kBoxB / 16) + in_box, step != 0);
  }
  ptx::wgmma_commit();
}

// Starts D += A B: A [64, kDepth] in registers, rounded and paired, B the first kDepth rows of a
// tile.
template <typename Element, int kDepth, int kBoxB, int kSize, int kPairs>
__device__ __forceinline__ void start_registers_by_columns(float (&d)[kSize], uint32_t (&a)[kPairs],
                                                           uint32_t b) {
  const uint64_t b_tile = smem_descriptor(b, kBoxB);
  ptx::held(a);
  ptx::held(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    ptx::wgmma_rs<Element, ptx::Major::mn>(d, a + 4 * step, b_tile + step * (16 * 128 / 16), true);
  }
  ptx::wgmma_commit();
}

}  // namespace online_attention::cuda::hopper
