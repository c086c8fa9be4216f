// SPDX-License-Identifier: BSD-3-Clause
// The kernel for bf16 with AMX. Compiled with those flags; see query_tile.h.
#include "cpu/isa_amx_bf16.h"
// After the products that it is to take.
#include "cpu/tile_kernels.h"

namespace online_attention::cpu::amx_bf16 {

TileKernel tile_kernel(DType dtype) {
  static const TileKernel narrower = avx512_bf16::tile_kernel(DType::bf16);
  if (dtype != DType::bf16) return avx512_bf16::tile_kernel(dtype);
  using Packed = TileForward<Isa, Bf16, false>;
  TileKernel kernel = narrower;
  kernel.scratch_bytes = [](int64_t D, int64_t D_v) {
    const int64_t in_place = narrower.scratch_bytes(D, D_v), packed = Packed::scratch_bytes(D, D_v);
    return in_place > packed ? in_place : packed;
  };
  kernel.attend = [](const QueryTile& tile, std::byte* scratch) {
    tile.in_place ? narrower.attend(tile, scratch) : Packed::attend(tile, scratch);
  };
  kernel.thread = {Tiles::configure, Tiles::release};
  return kernel;
}

}  // namespace online_attention::cpu::amx_bf16
