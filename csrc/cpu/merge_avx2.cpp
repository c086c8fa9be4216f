// SPDX-License-Identifier: BSD-3-Clause
// Merging with AVX2, FMA and F16C. Compiled with those flags. Memory bounds it: no wider set pays.
#include "cpu/isa_avx2.h"
#include "cpu/merge_kernel.h"

namespace online_attention::cpu::avx2 {

template <class Element>
MergeKernel<Element> merge_kernel() {
  return MergeLoops<Isa, Element>::kernel();
}
template MergeKernel<F16> merge_kernel();
template MergeKernel<Bf16> merge_kernel();
template MergeKernel<float> merge_kernel();
template MergeKernel<double> merge_kernel();

}  // namespace online_attention::cpu::avx2
