// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "core/launch.h"

namespace online_attention::cuda {

// Sets device memory to zero bytes, in the order of the stream.
Status fill_zero(void* memory, int64_t bytes, void* stream);

}  // namespace online_attention::cuda
