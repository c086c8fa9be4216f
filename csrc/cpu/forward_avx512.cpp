// SPDX-License-Identifier: BSD-3-Clause
// The kernel for AVX-512 (F, BW, DQ, VL). Compiled with those flags; see query_tile.h.
#include "cpu/isa_avx512.h"
#include "cpu/tile_kernels.h"

namespace online_attention::cpu::avx512 {

TileKernel tile_kernel(DType dtype) { return tile_kernel_of<Isa>(dtype); }

}  // namespace online_attention::cpu::avx512
