// SPDX-License-Identifier: BSD-3-Clause
// From torch's tensors to the plain structs of csrc/core, and back to new tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>

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

// `tensor` itself if its last dimension is contiguous, else a copy.
Tensor with_contiguous_rows(const Tensor& tensor);

// Of a rank-4 tensor whose last dimension is contiguous.
View view_of(const Tensor& tensor);

// Uninitialised [B, H, S_q, D_v], dense, its dimensions in the memory order of the query.
Tensor empty_like_query(const Tensor& q, const Shape& shape);
// Uninitialised [B, H, S_q], contiguous, float64 for float64 and float32 otherwise.
Tensor empty_lse(const Tensor& q, const Problem& problem);
Tensor empty_bytes(const Tensor& like, int64_t bytes);

}  // namespace online_attention::bindings
