// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/launch.h"
#include "core/merge.h"

namespace online_attention::cpu {

// Merges parts of any dtype, sizes and strides, in the order given, and its gradients. Bitwise the
// same results for any number of threads.
Status merge(const MergeArgs& args, const Launch& launch);
Status merge_backward(const MergeBackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cpu
