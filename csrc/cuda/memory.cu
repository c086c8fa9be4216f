// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/memory.h"

#include <cuda_runtime_api.h>

namespace online_attention::cuda {

Status fill_zero(void* memory, int64_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes),
                                            static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? kOk : cudaGetErrorString(error);
}

}  // namespace online_attention::cuda
