// SPDX-License-Identifier: BSD-3-Clause
// From torch's tensors to the plain structs of csrc/core, and back to new tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::bindings {

using torch::stable::Tensor;

// A shim of libtorch failed: torch has printed why to stderr.
void check_torch(AOTITorchError code, const char* what);

// Throws std::invalid_argument, with a sentence, unless the three tensors are one problem.
struct Problem {
  DType dtype = DType::f32;
  Shape shape;
};
Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v);

// Throws unless the tensor is given, dense, of this shape and dtype, and on the device of `like`.
void check_same(const Tensor& tensor, const char* name, const Tensor& like, int32_t dtype,
                const std::vector<int64_t>& shape);

// Throws unless the tensor is given, dense, on the device of `like`, and each of its four sizes is
// 1 or that of `shape`. Returns its strides, 0 for sizes of 1.
std::array<int64_t, 4> broadcast_strides(const Tensor& tensor, const char* name, const Tensor& like,
                                         const std::array<int64_t, 4>& shape);

// `tensor` itself if its last dimension is contiguous, else a copy.
Tensor with_contiguous_rows(const Tensor& tensor);

// torch's code of a tensor's dtype, and that of the lse of inputs of `dtype`. dtype_of throws for a
// dtype that is not among ours.
int32_t dtype_code(const Tensor& tensor);
DType dtype_of(const Tensor& tensor, const char* name);
int32_t lse_dtype(DType dtype);

// Of the first three dimensions of a tensor; a fourth must be contiguous.
View view_of(const Tensor& tensor);

// Uninitialised [like.size(0), like.size(1), like.size(2), columns], dense, of the dtype of `like`,
// its first three dimensions in the memory order of `like`.
Tensor empty_in_order_of(const Tensor& like, int64_t columns);
// Uninitialised [count, *like.shape], one after the other, each as empty_in_order_of makes it.
Tensor empty_stack_of(const Tensor& like, int64_t count);
// Uninitialised [B, H, S_q], contiguous, float64 for float64 and float32 otherwise.
Tensor empty_lse(const Tensor& q, const Problem& problem);
// Uninitialised, of the dtype of `like`.
Tensor empty_contiguous(const Tensor& like, const std::vector<int64_t>& sizes);
// Uninitialised, one-dimensional, of the dtype of `like`.
Tensor empty_elements(const Tensor& like, int64_t count);
Tensor empty_bytes(const Tensor& like, int64_t bytes);

}  // namespace online_attention::bindings
