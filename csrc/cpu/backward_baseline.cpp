// SPDX-License-Identifier: BSD-3-Clause
// The gradients for any processor of the architecture; see gradient_tile.h.
#include "cpu/backward_kernel.h"
#include "cpu/isa_baseline.h"

namespace online_attention::cpu::baseline {

GradientKernel gradient_kernel(DType dtype) { return gradient_kernel_of<Isa>(dtype); }

}  // namespace online_attention::cpu::baseline
