// SPDX-License-Identifier: BSD-3-Clause
#include "bindings/tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace online_attention::bindings {
namespace {

[[noreturn]] void reject(const std::string& sentence) { throw std::invalid_argument(sentence); }

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

void check_rank(const Tensor& tensor, const char* name, const char* expected) {
  if (!tensor.defined()) reject(std::string(name) + " must be a tensor, not None.");
  int32_t layout = 0;
  check_torch(aoti_torch_get_layout(tensor.get(), &layout), "reading a tensor's layout");
  if (layout != aoti_torch_layout_strided()) {
    reject(std::string(name) + " must be a dense tensor: call .to_dense() first.");
  }
  if (tensor.dim() != 4) {
    reject(std::string(name) + " must have 4 dimensions " + expected + ", but its shape is " +
           shape_text(tensor) + ".");
  }
}

void check_like_query(const Tensor& tensor, const Tensor& q, const char* name) {
  if (dtype_code(tensor) != dtype_code(q)) {
    reject(std::string(name) + " must have the dtype of q: convert it with .to(q.dtype).");
  }
  if (tensor.is_cuda() != q.is_cuda() || tensor.get_device_index() != q.get_device_index()) {
    reject(std::string(name) + " must be on the device of q: move it with .to(q.device).");
  }
}

void check_size(const Tensor& tensor, const char* name, int64_t dim, const char* symbol,
                int64_t expected) {
  if (tensor.size(dim) == expected) return;
  reject(std::string(name) + ".shape[" + std::to_string(dim) + "] must be " + symbol + " = " +
         std::to_string(expected) + ", but the shape of " + name + " is " + shape_text(tensor) +
         ".");
}

Tensor empty(const Tensor& like, int64_t rank, const int64_t* sizes, const int64_t* strides,
             int32_t dtype) {
  int32_t device_type = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &device_type), "reading a tensor's device");
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(rank, sizes, strides, dtype, device_type,
                                       like.get_device_index(), &handle),
              "allocating a tensor");
  return Tensor(handle);
}

// Of a dense tensor of these sizes whose first three dimensions are in the memory order of `like`.
std::array<int64_t, 4> dense_strides(const Tensor& like, const std::array<int64_t, 4>& sizes) {
  std::array<int, 3> order = {0, 1, 2};
  // A broadcast tensor (stride 0) has no memory order to keep.
  if (like.stride(0) != 0 && like.stride(1) != 0 && like.stride(2) != 0) {
    std::ranges::stable_sort(order, [&](int a, int b) { return like.stride(a) > like.stride(b); });
  }
  std::array<int64_t, 4> strides = {0, 0, 0, 1};
  int64_t dense = std::max<int64_t>(sizes[3], 1);
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    strides[*dim] = dense;
    dense *= std::max<int64_t>(sizes[*dim], 1);
  }
  return strides;
}

}  // namespace

void check_torch(AOTITorchError code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string(what) + " failed; torch's message is above.");
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rank(q, "q", "(B, H, S_q, D)");
  check_rank(k, "k", "(B, H_kv, S_kv, D)");
  check_rank(v, "v", "(B, H_kv, S_kv, D_v)");
  const Problem problem = {.dtype = dtype_of(q, "q"),
                           .shape = {.B = q.size(0),
                                     .H = q.size(1),
                                     .H_kv = k.size(1),
                                     .S_q = q.size(2),
                                     .S_kv = k.size(2),
                                     .D = q.size(3),
                                     .D_v = v.size(3)}};
  check_like_query(k, q, "k");
  check_like_query(v, q, "v");
  const Shape& s = problem.shape;
  check_size(k, "k", 0, "B", s.B);
  check_size(k, "k", 3, "D", s.D);
  check_size(v, "v", 0, "B", s.B);
  check_size(v, "v", 1, "H_kv", s.H_kv);
  check_size(v, "v", 2, "S_kv", s.S_kv);
  if (s.H_kv == 0 ? s.H != 0 : s.H % s.H_kv != 0) {
    reject("H must be a multiple of H_kv, but q has H = " + std::to_string(s.H) +
           " heads and k has H_kv = " + std::to_string(s.H_kv) + ".");
  }
  if (s.D < 1 || s.D_v < 1)
    reject("D and D_v, the last dimensions of q and v, must be at least 1.");
  const int64_t longest = std::max({s.S_q, s.S_kv, s.D, s.D_v});
  if (longest > kMaxLength) {
    reject("S_q, S_kv, D and D_v must be at most " + std::to_string(kMaxLength) +
           ", but one of them is " + std::to_string(longest) + ".");
  }
  if (s.H != 0 && s.B > std::numeric_limits<int32_t>::max() / s.H) {
    reject("B * H must be below 2^31, but q has B = " + std::to_string(s.B) +
           " and H = " + std::to_string(s.H) + ".");
  }
  return problem;
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  check_torch(aoti_torch_get_dtype(tensor.get(), &code), "reading a tensor's dtype");
  return code;
}

DType dtype_of(const Tensor& tensor, const char* name) {
  const int32_t code = dtype_code(tensor);
  if (code == aoti_torch_dtype_float16()) return DType::f16;
  if (code == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (code == aoti_torch_dtype_float32()) return DType::f32;
  if (code == aoti_torch_dtype_float64()) return DType::f64;
  reject(std::string(name) +
         " must be float16, bfloat16, float32 or float64: convert the inputs with .to().");
}

int32_t lse_dtype(DType dtype) {
  return dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

void check_same(const Tensor& tensor, const char* name, const Tensor& like, int32_t dtype,
                const std::vector<int64_t>& shape) {
  if (!tensor.defined()) reject(std::string(name) + " must be a tensor, not None.");
  if (dtype_code(tensor) != dtype) reject(std::string(name) + " has the wrong dtype.");
  if (tensor.is_cuda() != like.is_cuda() || tensor.get_device_index() != like.get_device_index()) {
    reject(std::string(name) + " must be on the device of q: move it with .to(q.device).");
  }
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "(";
  for (std::size_t d = 0; d < shape.size(); ++d) {
    equal = equal && tensor.size(static_cast<int64_t>(d)) == shape[d];
    expected += (d == 0 ? "" : ", ") + std::to_string(shape[d]);
  }
  if (equal) return;
  reject(std::string(name) + " must have the shape " + expected + "), but its shape is " +
         shape_text(tensor) + ".");
}

std::array<int64_t, 4> broadcast_strides(const Tensor& tensor, const char* name, const Tensor& like,
                                         const std::array<int64_t, 4>& shape) {
  check_rank(tensor, name, "(B, H, S_q, S_kv)");
  if (tensor.is_cuda() != like.is_cuda() || tensor.get_device_index() != like.get_device_index()) {
    reject(std::string(name) + " must be on the device of q: move it with .to(q.device).");
  }
  std::array<int64_t, 4> strides = {0, 0, 0, 0};
  bool fits = true;
  std::string expected = "(";
  for (std::size_t d = 0; d < shape.size(); ++d) {
    const auto dim = static_cast<int64_t>(d);
    fits = fits && (tensor.size(dim) == shape[d] || tensor.size(dim) == 1);
    if (tensor.size(dim) != 1) strides[d] = tensor.stride(dim);
    expected += (d == 0 ? "" : ", ") + std::to_string(shape[d]);
  }
  if (fits) return strides;
  reject(std::string(name) + " must have sizes that are 1 or those of (B, H, S_q, S_kv) = " +
         expected + "), but its shape is " + shape_text(tensor) + ".");
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  if (tensor.stride(3) == 1 || tensor.size(3) <= 1) return tensor;
  return torch::stable::contiguous(tensor);
}

View view_of(const Tensor& tensor) {
  return {.data = tensor.data_ptr(),
          .stride_b = tensor.stride(0),
          .stride_h = tensor.stride(1),
          .stride_s = tensor.stride(2)};
}

Tensor empty_in_order_of(const Tensor& like, int64_t columns) {
  const std::array<int64_t, 4> sizes = {like.size(0), like.size(1), like.size(2), columns};
  const std::array<int64_t, 4> strides = dense_strides(like, sizes);
  return empty(like, 4, sizes.data(), strides.data(), dtype_code(like));
}

Tensor empty_stack_of(const Tensor& like, int64_t count) {
  const std::array<int64_t, 4> one = {like.size(0), like.size(1), like.size(2), like.size(3)};
  const std::array<int64_t, 4> strides = dense_strides(like, one);
  int64_t stack = 1;
  for (const int64_t size : one) stack *= std::max<int64_t>(size, 1);
  const int64_t all_sizes[] = {count, one[0], one[1], one[2], one[3]};
  const int64_t all_strides[] = {stack, strides[0], strides[1], strides[2], strides[3]};
  return empty(like, 5, all_sizes, all_strides, dtype_code(like));
}

Tensor empty_lse(const Tensor& q, const Problem& problem) {
  const Shape& s = problem.shape;
  const std::array<int64_t, 3> sizes = {s.B, s.H, s.S_q};
  const int64_t row = std::max<int64_t>(s.S_q, 1);
  const std::array<int64_t, 3> strides = {row * std::max<int64_t>(s.H, 1), row, 1};
  return empty(q, 3, sizes.data(), strides.data(), lse_dtype(problem.dtype));
}

Tensor empty_contiguous(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t dense = 1;
  for (std::size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = dense;
    dense *= std::max<int64_t>(sizes[dim], 1);
  }
  return empty(like, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
               dtype_code(like));
}

Tensor empty_elements(const Tensor& like, int64_t count) {
  const int64_t stride = 1;
  return empty(like, 1, &count, &stride, dtype_code(like));
}

Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  const int64_t stride = 1;
  return empty(like, 1, &bytes, &stride, aoti_torch_dtype_uint8());
}

}  // namespace online_attention::bindings
