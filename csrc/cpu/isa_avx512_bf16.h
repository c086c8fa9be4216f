// SPDX-License-Identifier: BSD-3-Clause
// AVX-512 with AVX512-BF16, whose instruction adds the exact products of two pairs of bf16 to a
// float: twice the rate of single precision.
// In an unnamed namespace: every file that includes this is compiled for the set, and whatever it
// makes of Isa is its own.
#pragma once

#include <immintrin.h>

#include "cpu/operand.h"

namespace online_attention::cpu::avx512_bf16 {
namespace {

struct Pairs;

struct Isa {
  static constexpr int kVectorBytes = 64;
  static constexpr int kBlockRows = 12, kBlockVecs = 2;  // 24 of 32 registers hold sums
  static constexpr bool kRoundsProducts = false;
  template <class Element>
  using Operand = Pairs;

  using Wide = VectorOf<uint64_t, kVectorBytes>::type;

  // The products of the lower 32 bits of each 64-bit lane.
  static Wide multiply_words(Wide a, Wide b) {
    return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
  }

  typedef int32_t Table __attribute__((vector_size(kVectorBytes)));
  static Table look_up(Table table, Table index) {
    return (Table)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)index, (__m512i)table);
  }
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
  typedef int16_t Shorts __attribute__((vector_size(64)));
  static constexpr int kDepth = 2;
  static constexpr int kStepsTogether = 1, kFewestRows = 1;
  static constexpr bool kMultipliesInPlace = true;

  static Vec load_steps(const Bf16* row) { return Lanes::load_bits(row); }
  // A bf16 is the upper half of the float it widens to.
  static Vec load_columns(const Bf16* const (&rows)[2]) {
    const auto low = (Lanes::Words)Sums::load(rows[0]) >> 16;
    return (Vec)(low | (Lanes::Words)Sums::load(rows[1]));
  }
  // The same for kVecs vectors of columns.
  template <int kVecs>
  static void load_columns(const Bf16* const (&rows)[2], Vec (&to)[kVecs]) {
    if constexpr (kVecs % 2 == 1) {
      to[0] = load_columns(rows);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; i += 2) {
        Shorts row[2];
        __builtin_memcpy(&row[0], rows[0] + i * Lanes::kLanes, sizeof row[0]);
        __builtin_memcpy(&row[1], rows[1] + i * Lanes::kLanes, sizeof row[1]);
        to[i] = (Vec)__builtin_shufflevector(row[0], row[1], 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5,
                                             37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44,
                                             13, 45, 14, 46, 15, 47);
        to[i + 1] = (Vec)__builtin_shufflevector(row[0], row[1], 16, 48, 17, 49, 18, 50, 19, 51, 20,
                                                 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                                 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
      }
    }
  }

  static Number weights(const Weight* p) {
    Number pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return pair;
  }
  static void store_weights(Sums::Vec v, Weight* to) {
    const __m256bh narrow = _mm512_cvtneps_pbh(v);
    __builtin_memcpy(to, &narrow, sizeof narrow);
  }
  static float widen(Weight p) { return __builtin_bit_cast(float, uint32_t{p.bits} << 16); }

  static void store_step(const Sums::Vec (&rows)[2], Number* step) {
    Lanes::store(interleave(_mm512_cvtne2ps_pbh(rows[1], rows[0])), step);
  }
  static void store_step(const Sums::Vec (&rows)[2], Number* step, Number* const (&columns)[2]) {
    const __m512bh narrow = _mm512_cvtne2ps_pbh(rows[1], rows[0]);  // rows[0] in the lower half
    Lanes::store(interleave(narrow), step);
    __builtin_memcpy(columns[0], &narrow, sizeof narrow / 2);
    __builtin_memcpy(columns[1], (const char*)&narrow + sizeof narrow / 2, sizeof narrow / 2);
  }
  static Vec interleave(__m512bh rows) {
    const auto r = (Shorts)rows;
    return (Vec)__builtin_shufflevector(r, r, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                        23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                        15, 31);
  }

  static __m512 multiply_add(__m512 sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace
}  // namespace online_attention::cpu::avx512_bf16
