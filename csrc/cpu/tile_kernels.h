// SPDX-License-Identifier: BSD-3-Clause
// The forward kernels of one instruction set, as the dispatcher takes them.
#pragma once

#include "cpu/forward_kernel.h"

namespace online_attention::cpu {

template <class Isa, class Element>
struct TileForms {
  using InPlace = TileForward<Isa, Element, true>;
  using Packed = TileForward<Isa, Element, false>;
  static int64_t scratch_bytes(int64_t D, int64_t D_v) {
    const int64_t in_place = InPlace::scratch_bytes(D, D_v), packed = Packed::scratch_bytes(D, D_v);
    return in_place > packed ? in_place : packed;
  }
  static void attend(const QueryTile& tile, std::byte* scratch) {
    tile.in_place ? InPlace::attend(tile, scratch) : Packed::attend(tile, scratch);
  }
};

template <class Isa, class Element>
TileKernel tile_kernel_of() {
  using Forms = TileForms<Isa, Element>;
  return {Forms::scratch_bytes, Forms::attend, RowResults<Isa, Element>::join};
}

template <class Isa>
TileKernel tile_kernel_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return tile_kernel_of<Isa, F16>();
    case DType::bf16:
      return tile_kernel_of<Isa, Bf16>();
    case DType::f32:
      return tile_kernel_of<Isa, float>();
    case DType::f64:
      break;
  }
  return tile_kernel_of<Isa, double>();
}

}  // namespace online_attention::cpu
