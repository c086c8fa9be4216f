// SPDX-License-Identifier: BSD-3-Clause
// Merging on any processor of the architecture.
#include <bit>

#include "cpu/merge_kernel.h"

namespace online_attention::cpu::baseline {
namespace {

struct Isa {
  static constexpr int kVectorBytes = 16;
  typedef float Floats __attribute__((vector_size(16)));

  // Slow where the compiler has no instruction for it; such processors are old.
  static Floats load(const F16* from) {
    Floats v;
    for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(std::bit_cast<_Float16>(from[i].bits));
    return v;
  }
  static void store(Floats v, F16* to) {
    for (int i = 0; i < 4; ++i) to[i].bits = std::bit_cast<uint16_t>(static_cast<_Float16>(v[i]));
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

}  // namespace online_attention::cpu::baseline
