// SPDX-License-Identifier: BSD-3-Clause
// Loads and stores at 32-bit shared-window addresses (see shared_address).
#pragma once

#include <cstdint>

namespace online_attention::cuda::ptx {

// ld.shared.v4.b32; 16-byte aligned.
__device__ __forceinline__ void load_shared(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// ld.shared.v2.b32; 8-byte aligned.
__device__ __forceinline__ void load_shared(uint32_t (&words)[2], uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(address)
               : "memory");
}

// ld.shared.b32; 4-byte aligned.
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// st.shared.v4.b32; 16-byte aligned.
__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// st.shared.b32; 4-byte aligned.
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// ld.shared.b16; of a 16-bit element.
template <typename Element>
__device__ __forceinline__ Element load_shared_element(uint32_t address) {
  static_assert(sizeof(Element) == 2);
  uint16_t bits;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
  return reinterpret_cast<const Element&>(bits);
}

// st.shared.b16; of a 16-bit element.
template <typename Element>
__device__ __forceinline__ void store_shared_element(uint32_t address, Element x) {
  static_assert(sizeof(Element) == 2);
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(reinterpret_cast<const uint16_t&>(x))
               : "memory");
}

}  // namespace online_attention::cuda::ptx
