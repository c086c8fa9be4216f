// SPDX-License-Identifier: BSD-3-Clause
// The gradients for bf16 with AMX. Compiled with those flags; see gradient_tile.h.
#include "cpu/isa_amx_bf16.h"
// After the products that it is to take.
#include "cpu/backward_kernel.h"

namespace online_attention::cpu::amx_bf16 {
namespace {

// Rows in place are those of the narrower kernel.
struct Either {
  using Tile = TileBackward<Isa, Bf16>;
  static const GradientKernel& of(const KeyTile& tile) {
    static const GradientKernel in_place = avx512_bf16::gradient_kernel(DType::bf16);
    static const GradientKernel packed = gradient_kernel_of<Isa, Bf16>();
    return tile.in_place ? in_place : packed;
  }
  static int64_t scratch_bytes(int64_t D, int64_t D_v) {
    const int64_t in_place = of({.in_place = true}).scratch_bytes(D, D_v);
    const int64_t packed = Tile::scratch_bytes(D, D_v);
    return in_place > packed ? in_place : packed;
  }
  static void measure(const KeyTile& tile, const QueryRows& rows, std::byte* scratch) {
    of(tile).measure(tile, rows, scratch);
  }
  static void start(const KeyTile& tile, std::byte* scratch) { of(tile).start(tile, scratch); }
  static void add(const KeyTile& tile, const QueryRows& rows, const QueryRows* next, int slot,
                  std::byte* scratch) {
    of(tile).add(tile, rows, next, slot, scratch);
  }
  static void add_dq(const KeyTile& tile, const QueryRows& rows, int slot, Turn turn,
                     std::byte* scratch) {
    of(tile).add_dq(tile, rows, slot, turn, scratch);
  }
  static void finish(const KeyTile& tile, std::byte* scratch) { of(tile).finish(tile, scratch); }
};

}  // namespace

GradientKernel gradient_kernel(DType dtype) {
  GradientKernel kernel = avx512_bf16::gradient_kernel(dtype);
  if (dtype != DType::bf16) return kernel;
  kernel.scratch_bytes = Either::scratch_bytes;
  kernel.measure = Either::measure;
  kernel.start = Either::start;
  kernel.add = Either::add;
  kernel.add_dq = Either::add_dq;
  kernel.finish = Either::finish;
  kernel.thread = {Tiles::configure, Tiles::release};
  return kernel;
}

}  // namespace online_attention::cpu::amx_bf16
