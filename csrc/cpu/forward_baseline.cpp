// SPDX-License-Identifier: BSD-3-Clause
// The kernel for any processor of the architecture; see query_tile.h.
#include "cpu/isa_baseline.h"
#include "cpu/tile_kernels.h"

namespace online_attention::cpu::baseline {

TileKernel tile_kernel(DType dtype) { return tile_kernel_of<Isa>(dtype); }

}  // namespace online_attention::cpu::baseline
