// SPDX-License-Identifier: BSD-3-Clause
// AVX2 with FMA and F16C.
// In an unnamed namespace: every file that includes this is compiled for the set, and whatever it
// makes of Isa is its own.
#pragma once

#include <immintrin.h>

#include "cpu/operand.h"

namespace online_attention::cpu::avx2 {
namespace {

struct Isa {
  static constexpr int kVectorBytes = 32;
  static constexpr int kBlockRows = 6, kBlockVecs = 2;  // 12 of 16 registers hold sums
  static constexpr bool kRoundsProducts = false;
  template <class Element>
  using Operand = Widened<Isa, Element>;

  using Wide = VectorOf<uint64_t, kVectorBytes>::type;

  // The products of the lower 32 bits of each 64-bit lane.
  static Wide multiply_words(Wide a, Wide b) {
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
  }

  typedef int32_t Table __attribute__((vector_size(kVectorBytes)));
  static Table look_up(Table table, Table index) {
    return (Table)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
  }

  static __m256 load(const F16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  }
  static void store(__m256 v, F16* to) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace online_attention::cpu::avx2
