// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/tensor_map.h"

#include <cuda_runtime_api.h>

#include "cuda/hopper/config.h"

namespace online_attention::cuda::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, through the runtime: nothing links against libcuda.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    constexpr unsigned kSinceCuda12 = 12000;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, kSinceCuda12, cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

// A dimension as the map has it: broadcast ones shrink to size 1.
struct Dimension {
  uint64_t size, stride_bytes;
};
Dimension dimension(int64_t size, int64_t stride, int64_t element_bytes) {
  if (size == 1 || stride == 0) return {1, 16};  // any multiple of 16
  return {static_cast<uint64_t>(size), static_cast<uint64_t>(stride * element_bytes)};
}

}  // namespace

Status describe(const View& view, const TensorSizes& sizes, DType dtype, int box_rows,
                TensorBox& box) {
  const Encode encode = encoder();
  if (encode == nullptr)
    return "the CUDA driver is too old for tensor maps: it must be 12.0 or newer";
  const int64_t bytes = element_bytes(dtype);
  const Dimension s = dimension(sizes.S, view.stride_s, bytes),
                  h = dimension(sizes.H, view.stride_h, bytes),
                  b = dimension(sizes.B, view.stride_b, bytes);
  box.step_h = h.size > 1;
  box.step_b = b.size > 1;
  const cuuint64_t size[4] = {static_cast<cuuint64_t>(sizes.D), s.size, h.size, b.size};
  const cuuint64_t stride[3] = {s.stride_bytes, h.stride_bytes, b.stride_bytes};
  const cuuint32_t extent[4] = {ForwardConfig::kColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  const CUresult error = encode(
      &box.map,
      dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      view.data, size, stride, extent, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? kOk
                               : "the CUDA driver refused to describe a tensor to the copy engine";
}

}  // namespace online_attention::cuda::hopper
