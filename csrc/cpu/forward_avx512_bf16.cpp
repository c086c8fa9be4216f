// SPDX-License-Identifier: BSD-3-Clause
// The kernel for bf16 with AVX512-BF16. Compiled with those flags; see query_tile.h.
#include "cpu/isa_avx512_bf16.h"
#include "cpu/tile_kernels.h"

namespace online_attention::cpu::avx512_bf16 {

TileKernel tile_kernel(DType dtype) {
  return dtype == DType::bf16 ? tile_kernel_of<Isa, Bf16>() : avx512::tile_kernel(dtype);
}

}  // namespace online_attention::cpu::avx512_bf16
