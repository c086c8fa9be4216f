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

// A map of `columns`, 64 of them swizzled, and box_rows[i] of each further dimension.
template <int kRank>
Status encode_map(const View& view, int64_t D, DType dtype, const Dimension (&dimensions)[kRank],
                  const cuuint32_t (&box_rows)[kRank], CUtensorMap& map,
                  cuuint32_t columns = ForwardConfig::kColumns) {
  const Encode encode = encoder();
  if (encode == nullptr)
    return "the CUDA driver is too old for tensor maps: it must be 12.0 or newer";
  cuuint64_t size[kRank + 1] = {static_cast<cuuint64_t>(D)}, stride[kRank];
  cuuint32_t extent[kRank + 1] = {columns}, step[kRank + 1] = {1};
  for (int i = 0; i < kRank; ++i) {
    size[i + 1] = dimensions[i].size;
    stride[i] = dimensions[i].stride_bytes;
    extent[i + 1] = box_rows[i];
    step[i + 1] = 1;
  }
  const CUresult error = encode(
      &map,
      dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kRank + 1, view.data, size, stride, extent, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      columns == ForwardConfig::kColumns ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? kOk
                               : "the CUDA driver refused to describe a tensor to the copy engine";
}

}  // namespace

Status describe(const View& view, const TensorSizes& sizes, DType dtype, int box_rows,
                TensorBox& box, int columns) {
  const int64_t bytes = element_bytes(dtype);
  const Dimension rows[] = {dimension(sizes.S, view.stride_s, bytes),
                            dimension(sizes.H, view.stride_h, bytes),
                            dimension(sizes.B, view.stride_b, bytes)};
  box.step_h = rows[1].size > 1;
  box.step_b = rows[2].size > 1;
  return encode_map(view, sizes.D, dtype, rows, {static_cast<cuuint32_t>(box_rows), 1, 1}, box.map,
                    static_cast<cuuint32_t>(columns));
}

Status describe_packed(const View& view, const TensorSizes& sizes, DType dtype, int box_rows,
                       int pack, TensorBox& box) {
  const int64_t bytes = element_bytes(dtype);
  const Dimension rows[] = {dimension(pack, view.stride_h, bytes),
                            dimension(sizes.S, view.stride_s, bytes),
                            dimension(sizes.H / pack, view.stride_h * pack, bytes),
                            dimension(sizes.B, view.stride_b, bytes)};
  box.step_h = rows[2].size > 1;
  box.step_b = rows[3].size > 1;
  const auto packed = static_cast<cuuint32_t>(pack),
             queries = static_cast<cuuint32_t>(box_rows / pack);
  return encode_map(view, sizes.D, dtype, rows, {packed, queries, 1, 1}, box.map);
}

}  // namespace online_attention::cuda::hopper
