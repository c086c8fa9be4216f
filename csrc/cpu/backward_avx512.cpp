// SPDX-License-Identifier: BSD-3-Clause
// The gradients for AVX-512 (F, BW, DQ, VL). Compiled with those flags; see gradient_tile.h.
#include "cpu/backward_kernel.h"
#include "cpu/isa_avx512.h"

namespace online_attention::cpu::avx512 {

GradientKernel gradient_kernel(DType dtype) { return gradient_kernel_of<Isa>(dtype); }

}  // namespace online_attention::cpu::avx512
