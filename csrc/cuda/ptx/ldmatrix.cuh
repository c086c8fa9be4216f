// SPDX-License-Identifier: BSD-3-Clause
// Warp-wide loads of 8 x 8 matrices of 16-bit elements from shared memory.
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// The 32-bit shared-window address that the instructions below take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16 (PTX 6.5, sm_75). Lane 8i + r gives the address of row r
// of matrix i (16 bytes, 16-byte aligned); register i of lane 4r + c receives elements 2c, 2c + 1
// of row r of matrix i. All 32 lanes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 (PTX 6.5, sm_75). As above, but each matrix
// arrives transposed: lane 4r + c receives elements r of rows 2c, 2c + 1.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace online_attention::cuda::ptx
