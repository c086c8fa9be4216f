// SPDX-License-Identifier: BSD-3-Clause
// The gradients for bf16 with AVX512-BF16. Compiled with those flags; see gradient_tile.h.
#include "cpu/backward_kernel.h"
#include "cpu/isa_avx512_bf16.h"

namespace online_attention::cpu::avx512_bf16 {

GradientKernel gradient_kernel(DType dtype) {
  return dtype == DType::bf16 ? gradient_kernel_of<Isa, Bf16>() : avx512::gradient_kernel(dtype);
}

}  // namespace online_attention::cpu::avx512_bf16
