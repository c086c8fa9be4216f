// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/launch.h"
#include "core/merge.h"

namespace online_attention::cuda {

int64_t merge_workspace_bytes(const MergeArgs& args, const Device& device);
int64_t merge_workspace_bytes(const MergeBackwardArgs& args, const Device& device);

// Merges any number of parts of any dtype, sizes and strides, in the order given, and its
// gradients, in one kernel each. Bitwise the same results in every run.
Status merge(const MergeArgs& args, const Launch& launch);
Status merge_backward(const MergeBackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda
