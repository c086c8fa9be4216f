// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/device.h"

#include <cuda_runtime_api.h>

namespace online_attention::cuda {

Status describe_device(int index, Device& device) {
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
  int smem_per_block = 0;
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
        std::pair{cudaDevAttrComputeCapabilityMinor, &minor},
        std::pair{cudaDevAttrMultiProcessorCount, &multiprocessors},
        std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, &smem_per_block}}) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  device = {.kind = DeviceKind::cuda,
            .arch = 10 * major + minor,
            .multiprocessors = multiprocessors,
            .smem_per_block = smem_per_block};
  return kOk;
}

}  // namespace online_attention::cuda
