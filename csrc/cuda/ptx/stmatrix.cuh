// SPDX-License-Identifier: BSD-3-Clause
// Warp-wide stores of 8 x 8 matrices of 16-bit elements to shared memory.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// stmatrix.sync.aligned.m8n8.x4.shared.b16 (PTX 7.8, sm_90). Lane 8i + r gives the address of row r
// of matrix i (16 bytes, 16-byte aligned); register i of lane 4r + c holds elements 2c, 2c + 1 of
// row r of matrix i. All 32 lanes.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 (PTX 7.8, sm_90). As above, but each matrix is
// stored transposed: lane 4r + c holds elements r of rows 2c, 2c + 1.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace online_attention::cuda::ptx
