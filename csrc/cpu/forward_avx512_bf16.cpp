// SPDX-License-Identifier: BSD-3-Clause
// The kernel for bf16 with AVX512-BF16, whose instruction adds the exact products of two pairs of
// bf16 to a float: twice the rate of single precision. Compiled with those flags; see query_tile.h.
#include <immintrin.h>

#include "cpu/forward_kernel.h"

namespace online_attention::cpu::avx512_bf16 {
namespace {

struct Pairs;

struct Isa {
  static constexpr int kVectorBytes = 64;
  static constexpr int kBlockRows = 12, kBlockVecs = 2;  // 24 of 32 registers hold sums
  static constexpr bool kRoundsProducts = false;
  template <class Element>
  using Operand = Pairs;
};

// Two neighbouring elements of a row, or of a column, side by side in 32 bits.
struct Pairs {
  using Element = Bf16;
  using Real = float;
  using Number = int32_t;
  using Weight = Bf16;
  using Lanes = Simd<Isa, Number>;
  using Sums = Simd<Isa, Real>;
  using Vec = Lanes::Vec;
  static constexpr int kDepth = 2;

  static Vec load_steps(const Bf16* row) { return Lanes::load_bits(row); }
  // A bf16 is the upper half of the float it widens to.
  static Vec load_columns(const Bf16* const (&rows)[2]) {
    const auto low = (Lanes::Words)Sums::load(rows[0]) >> 16;
    return (Vec)(low | (Lanes::Words)Sums::load(rows[1]));
  }

  static Number weights(const Weight* p) {
    Number pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return pair;
  }
  static __m512 multiply_add(__m512 sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace

TileKernel tile_kernel(DType dtype) {
  return dtype == DType::bf16 ? tile_kernel_of<Isa, Bf16>() : avx512::tile_kernel(dtype);
}

}  // namespace online_attention::cpu::avx512_bf16
