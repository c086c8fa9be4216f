// SPDX-License-Identifier: BSD-3-Clause
// AVX-512 (F, BW, DQ, VL).
// In an unnamed namespace: every file that includes this is compiled for the set, and whatever it
// makes of Isa is its own.
#pragma once

#include <immintrin.h>

#include "cpu/operand.h"

namespace online_attention::cpu::avx512 {
namespace {

struct Isa {
  static constexpr int kVectorBytes = 64;
  static constexpr int kBlockRows = 12, kBlockVecs = 2;  // 24 of 32 registers hold sums
  static constexpr bool kRoundsProducts = false;
  template <class Element>
  using Operand = Widened<Isa, Element>;

  using Wide = VectorOf<uint64_t, kVectorBytes>::type;

  // The products of the lower 32 bits of each 64-bit lane.
  static Wide multiply_words(Wide a, Wide b) {
    return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
  }

  typedef int32_t Table __attribute__((vector_size(kVectorBytes)));
  static Table look_up(Table table, Table index) {
    return (Table)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)index, (__m512i)table);
  }

  // The masked forms, because g++ 12 warns of its own undefined operand in the plain ones.
  static constexpr __mmask16 kAll = 0xffff;

  static __m512 load(const F16* from) {
    return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256((const __m256i*)from));
  }
  static void store(__m512 v, F16* to) {
    _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace online_attention::cpu::avx512
