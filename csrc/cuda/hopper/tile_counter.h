// SPDX-License-Identifier: BSD-3-Clause
// The counter by which blocks take tiles.
#pragma once

#include <cstdint>

#include "core/launch.h"

namespace online_attention::cuda::hopper {

// A counter that is 0 when the next kernel on `stream` begins, for a kernel that leaves it at 0:
// one that belongs to the stream, so that nothing has to be launched for it. Where none can be had
// (during a capture, because a graph may run beside the stream that it was captured on; beyond 1024
// streams) it is `spare`, cleared.
Status zeroed_counter(void* stream, void* spare, uint32_t*& counter);

}  // namespace online_attention::cuda::hopper
