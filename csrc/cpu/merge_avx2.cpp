// SPDX-License-Identifier: BSD-3-Clause
// Merging with AVX2, FMA and F16C. Compiled with those flags. Memory bounds it: no wider set pays.
#include <immintrin.h>

#include "cpu/merge_kernel.h"

namespace online_attention::cpu::avx2 {
namespace {

struct Isa {
  static constexpr int kVectorBytes = 32;
  static __m256 load(const F16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  }
  static void store(__m256 v, F16* to) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

template <class Element>
MergeKernel<Element> merge_kernel() {
  return MergeLoops<Isa, Element>::kernel();
}
template MergeKernel<F16> merge_kernel();
template MergeKernel<Bf16> merge_kernel();
template MergeKernel<float> merge_kernel();
template MergeKernel<double> merge_kernel();

}  // namespace online_attention::cpu::avx2
