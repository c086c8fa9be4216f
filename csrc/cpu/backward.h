// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cpu {

int64_t backward_workspace_bytes(const BackwardArgs& args, const Device& device);

// The gradients of attention of any dtype, head dim and strides on the CPU. Bitwise the same result
// for any number of threads.
Status backward(const BackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cpu
