// SPDX-License-Identifier: BSD-3-Clause
// Launching a kernel over the tiles of a plan.
#pragma once

#include <cuda_runtime.h>

#include "core/launch.h"
#include "core/problem.h"
#include "cuda/tile_plan.h"

namespace online_attention::cuda {

template <typename... Params, typename... Args>
Status launch(void (*kernel)(Params...), int64_t blocks, int threads, int smem_bytes, void* stream,
              const Args&... args) {
  if (blocks < 1 || blocks > TilePlan::kMaxTiles) {
    return "the call has more than 2^31 query tiles: split its batch";
  }
  constexpr int kDefaultSmemBytes = 48 * 1024;  // what a kernel may have without asking
  if (smem_bytes > kDefaultSmemBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error != cudaSuccess) {
      static_cast<void>(cudaGetLastError());  // or the next launch would report it
      return cudaGetErrorString(error);
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, smem_bytes, static_cast<cudaStream_t>(stream)>>>(
      args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? kOk : cudaGetErrorString(error);
}

// Whether every row of a view starts on a 16-byte boundary, for elements of this many bytes.
inline bool is_aligned_16(const View& view, int64_t bytes) {
  const auto misaligned = [&](int64_t stride) { return stride * bytes % 16 != 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && !misaligned(view.stride_b) &&
         !misaligned(view.stride_h) && !misaligned(view.stride_s);
}

}  // namespace online_attention::cuda
