// SPDX-License-Identifier: BSD-3-Clause
// The three matrix products of a warp on tiles in shared memory (SmemTile), by which side is
// transposed. Accumulators are m16n8 fragments (cuda/fragment.cuh), acc[row atom][n8 tile].
//
// Operands are addressed by a lane's `base`, computed once, and SmemTile::advance from there, whose
// XOR must not carry: the chunk in a base is below the power of two that the advances step by.
#pragma once

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/smem_tile.cuh"

namespace online_attention::cuda::portable {

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % 32u; }

// Bases. `tile` is the address of a tile, plus whole rows (16 at a time); `chunk` a multiple of 2.
// Rows of the result, stored as rows: A of A B^T and A B.
template <int kWidth>
__device__ __forceinline__ uint32_t base_a(uint32_t tile) {
  return tile + SmemTile<kWidth>::offset(lane_index() % 16, lane_index() / 16);
}
// Columns of the result, stored as rows: B of A B^T. Of one n8 tile, two k16 steps are read at
// once.
template <int kWidth, bool kOneTile = false>
__device__ __forceinline__ uint32_t base_bt(uint32_t tile) {
  const unsigned lane = lane_index();
  if constexpr (kOneTile) return tile + SmemTile<kWidth>::offset(lane % 8, lane / 8);
  return tile + SmemTile<kWidth>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
// Columns of the result, stored as columns: B of A B and A^T B.
template <int kWidth>
__device__ __forceinline__ uint32_t base_b(uint32_t tile, unsigned chunk) {
  return tile + SmemTile<kWidth>::offset(lane_index() % 16, chunk + lane_index() / 16);
}
// Rows of the result, stored as columns: A of A^T B.
template <int kWidth>
__device__ __forceinline__ uint32_t base_at(uint32_t tile, unsigned chunk) {
  const unsigned lane = lane_index();
  return tile + SmemTile<kWidth>::offset(lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2);
}

// acc += A B^T over kDepth columns; both tiles are kDepth wide.
template <typename Element, int kDepth, int kAtoms, int kTiles>
__device__ __forceinline__ void multiply_abt(float (&acc)[kAtoms][kTiles][4], uint32_t a,
                                             uint32_t b) {
  using Tile = SmemTile<kDepth>;
  uint32_t b_part[4];
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a_part[kAtoms][4];
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
      ptx::ldmatrix_x4(a_part[atom], Tile::advance(a, 2 * step) + atom * 16 * Tile::kRowBytes);
    }
    if constexpr (kTiles == 1) {
      if (step % 2 == 0) ptx::ldmatrix_x4(b_part, Tile::advance(b, 2 * step));
#pragma unroll
      for (int atom = 0; atom < kAtoms; ++atom) {
        ptx::mma_m16n8k16(acc[atom][0], a_part[atom], b_part[step % 2 * 2],
                          b_part[step % 2 * 2 + 1], Element());
      }
    } else {
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        ptx::ldmatrix_x4(b_part, Tile::advance(b, 2 * step) + pair * 16 * Tile::kRowBytes);
#pragma unroll
        for (int atom = 0; atom < kAtoms; ++atom) {
          ptx::mma_m16n8k16(acc[atom][2 * pair], a_part[atom], b_part[0], b_part[1], Element());
          ptx::mma_m16n8k16(acc[atom][2 * pair + 1], a_part[atom], b_part[2], b_part[3], Element());
        }
      }
    }
  }
}

// One k16 step of acc += (A or A^T) B. Pairs of n8 tiles lie kColumnWarps pairs apart in B: warps
// side by side take turns.
template <typename Element, int kWidth, int kColumnWarps, int kAtoms, int kTiles>
__device__ __forceinline__ void multiply_step(float (&acc)[kAtoms][kTiles][4],
                                              const uint32_t (&a_part)[kAtoms][4], uint32_t b,
                                              int step) {
  using Tile = SmemTile<kWidth>;
#pragma unroll
  for (int pair = 0; pair < kTiles / 2; ++pair) {
    uint32_t b_part[4];
    ptx::ldmatrix_x4_trans(b_part,
                           Tile::advance(b, 2 * kColumnWarps * pair) + step * 16 * Tile::kRowBytes);
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
      ptx::mma_m16n8k16(acc[atom][2 * pair], a_part[atom], b_part[0], b_part[1], Element());
      ptx::mma_m16n8k16(acc[atom][2 * pair + 1], a_part[atom], b_part[2], b_part[3], Element());
    }
  }
}

// acc += A B; A is kDepth wide, B kWidth.
template <typename Element, int kDepth, int kWidth, int kColumnWarps, int kAtoms, int kTiles>
__device__ __forceinline__ void multiply_ab(float (&acc)[kAtoms][kTiles][4], uint32_t a,
                                            uint32_t b) {
  using Tile = SmemTile<kDepth>;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a_part[kAtoms][4];
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
      ptx::ldmatrix_x4(a_part[atom], Tile::advance(a, 2 * step) + atom * 16 * Tile::kRowBytes);
    }
    multiply_step<Element, kWidth, kColumnWarps>(acc, a_part, b, step);
  }
}

// acc += A^T B over kDepth rows; A is kRows wide, B kWidth.
template <typename Element, int kDepth, int kRows, int kWidth, int kColumnWarps, int kAtoms,
          int kTiles>
__device__ __forceinline__ void multiply_atb(float (&acc)[kAtoms][kTiles][4], uint32_t a,
                                             uint32_t b) {
  using Tile = SmemTile<kRows>;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t a_part[kAtoms][4];
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
      ptx::ldmatrix_x4_trans(a_part[atom],
                             Tile::advance(a, 2 * atom) + step * 16 * Tile::kRowBytes);
    }
    multiply_step<Element, kWidth, kColumnWarps>(acc, a_part, b, step);
  }
}

}  // namespace online_attention::cuda::portable
