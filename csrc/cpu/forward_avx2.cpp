// SPDX-License-Identifier: BSD-3-Clause
// The kernel for AVX2 with FMA and F16C. Compiled with those flags; see query_tile.h.
#include "cpu/isa_avx2.h"
#include "cpu/tile_kernels.h"

namespace online_attention::cpu::avx2 {

TileKernel tile_kernel(DType dtype) { return tile_kernel_of<Isa>(dtype); }

}  // namespace online_attention::cpu::avx2
