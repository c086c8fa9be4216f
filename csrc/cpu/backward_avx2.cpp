// SPDX-License-Identifier: BSD-3-Clause
// The gradients for AVX2 with FMA and F16C. Compiled with those flags; see gradient_tile.h.
#include "cpu/backward_kernel.h"
#include "cpu/isa_avx2.h"

namespace online_attention::cpu::avx2 {

GradientKernel gradient_kernel(DType dtype) { return gradient_kernel_of<Isa>(dtype); }

}  // namespace online_attention::cpu::avx2
