// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda {

// delta = rowsum(dout * out) - dlse (E28), for every query row: [B, H, S_q] contiguous. double for
// fp64, else float.
Status backward_delta(const BackwardArgs& args, float* delta, void* stream);
Status backward_delta(const BackwardArgs& args, double* delta, void* stream);

}  // namespace online_attention::cuda
