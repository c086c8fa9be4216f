// SPDX-License-Identifier: BSD-3-Clause
// Merging on any processor of the architecture.
#include "cpu/isa_baseline.h"
#include "cpu/merge_kernel.h"

namespace online_attention::cpu::baseline {

template <class Element>
MergeKernel<Element> merge_kernel() {
  return MergeLoops<Isa, Element>::kernel();
}
template MergeKernel<F16> merge_kernel();
template MergeKernel<Bf16> merge_kernel();
template MergeKernel<float> merge_kernel();
template MergeKernel<double> merge_kernel();

}  // namespace online_attention::cpu::baseline
