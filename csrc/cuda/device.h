// SPDX-License-Identifier: BSD-3-Clause
// What the host must ask of a CUDA device. Plain C++: includes no header of the CUDA toolkit.
#pragma once

#include "core/launch.h"

namespace online_attention::cuda {

// Fills in kind, arch and multiprocessors of the CUDA device with this index. Does not synchronise
// and is allowed while a graph is captured.
Status describe_device(int index, Device& device);

}  // namespace online_attention::cuda
