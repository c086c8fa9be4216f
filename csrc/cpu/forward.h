// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cpu {

// Where the parts of split keys meet.
int64_t forward_workspace_bytes(const ForwardArgs& args, const Device& device);

// Attention of any dtype, head dim and strides on the CPU, with the widest instruction set that
// the machine has. Bitwise the same result for any number of threads.
Status forward(const ForwardArgs& args, const Launch& launch);

}  // namespace online_attention::cpu
