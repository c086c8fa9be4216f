// SPDX-License-Identifier: BSD-3-Clause
// The operators under `merge`. As in ops.cpp, whatever reaches them is checked here once more.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/site.h"
#include "bindings/tensors.h"
#include "registry.h"

namespace online_attention::bindings {
namespace {

using Tensors = std::vector<Tensor>;

// The parts of one merge, their rows contiguous. Keeps the tensors that `parts` points into.
struct Parts {
  Parts(const Tensors& any_outs, const Tensors& any_lses);

  // Throws unless a tensor is on the device of the parts and shaped [B, H, S_q] or, with columns,
  // [B, H, S_q, D_v], and of the dtype of such.
  void check(const Tensor& tensor, const std::string& name, bool with_columns) const;

  DType dtype = DType::f32;
  MergeShape shape;
  Tensors outs, lses;
  std::vector<MergePart> parts;
};

Parts::Parts(const Tensors& any_outs, const Tensors& any_lses) : lses(any_lses) {
  if (any_outs.empty() || any_outs.size() != lses.size()) {
    throw std::invalid_argument("outs and lses must hold one tensor for each part, and at least " +
                                std::string("one, but hold ") + std::to_string(any_outs.size()) +
                                " and " + std::to_string(lses.size()) + ".");
  }
  const Tensor& first = any_outs[0];
  if (!first.defined() || first.dim() != 4) {
    throw std::invalid_argument("outs[0] must have 4 dimensions (B, H, S_q, D_v).");
  }
  dtype = dtype_of(first, "outs[0]");
  shape = {.B = first.size(0), .H = first.size(1), .S_q = first.size(2), .D_v = first.size(3)};
  outs.push_back(first);
  for (std::size_t r = 0; r < lses.size(); ++r) {
    const std::string index = std::to_string(r);
    check(any_outs[r], std::string("outs[").append(index).append("]"), true);
    check(lses[r], std::string("lses[").append(index).append("]"), false);
    if (r > 0) outs.push_back(any_outs[r]);
    outs[r] = with_contiguous_rows(outs[r]);
    parts.push_back({.out = view_of(outs[r]), .lse = view_of(lses[r])});
  }
}

void Parts::check(const Tensor& tensor, const std::string& name, bool with_columns) const {
  const Tensor& first = outs[0];
  if (tensor.defined() && (tensor.is_cuda() != first.is_cuda() ||
                           tensor.get_device_index() != first.get_device_index())) {
    throw std::invalid_argument(name + " must be on the device of outs[0]: move it there.");
  }
  std::vector<int64_t> sizes = {shape.B, shape.H, shape.S_q};
  if (with_columns) sizes.push_back(shape.D_v);
  check_same(tensor, name.c_str(), first, with_columns ? dtype_code(first) : lse_dtype(dtype),
             sizes);
}

std::tuple<Tensor, Tensor> merge(Tensors outs, Tensors lses) {
  const Parts parts(outs, lses);
  const Site site(outs[0]);
  Tensor out = empty_in_order_of(outs[0], parts.shape.D_v);
  Tensor lse = empty_contiguous(lses[0], {parts.shape.B, parts.shape.H, parts.shape.S_q});
  if (parts.shape.rows() > 0) {
    const MergeArgs args = {.dtype = parts.dtype,
                            .shape = parts.shape,
                            .parts = parts.parts.data(),
                            .count = static_cast<int64_t>(parts.parts.size()),
                            .out = view_of(out),
                            .lse = lse.data_ptr()};
    run(merge_passes(site.launch.device.kind).forward, args, site, out);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_backward(std::optional<Tensor> dout_any,
                                          std::optional<Tensor> dlse, Tensors outs, Tensors lses,
                                          bool needs_d_outs, bool needs_d_lses) {
  const Parts parts(outs, lses);
  const MergeShape& shape = parts.shape;
  const auto count = static_cast<int64_t>(parts.parts.size());
  std::optional<Tensor> dout;
  if (dout_any) parts.check(*dout_any, "dout", true);
  if (dout_any) dout = with_contiguous_rows(*dout_any);
  if (dlse) parts.check(*dlse, "dlse", false);
  const Site site(outs[0]);

  Tensor d_outs = needs_d_outs ? empty_stack_of(outs[0], count) : empty_elements(outs[0], 0);
  Tensor d_lses = needs_d_lses ? empty_contiguous(lses[0], {count, shape.B, shape.H, shape.S_q})
                               : empty_elements(lses[0], 0);
  if (shape.rows() > 0 && (needs_d_outs || needs_d_lses)) {
    MergeBackwardArgs args = {
        .dtype = parts.dtype, .shape = shape, .parts = parts.parts.data(), .count = count};
    if (dout) args.dout = view_of(*dout);
    if (dlse) args.dlse = view_of(*dlse);
    if (needs_d_lses) args.d_lses = d_lses.data_ptr();
    if (needs_d_outs) {
      args.d_outs = {.data = d_outs.data_ptr(),
                     .stride_b = d_outs.stride(1),
                     .stride_h = d_outs.stride(2),
                     .stride_s = d_outs.stride(3)};
      args.d_outs_stride = d_outs.stride(0);
    }
    run(merge_passes(site.launch.device.kind).backward, args, site, outs[0]);
  }
  return {d_outs, d_lses};
}

}  // namespace

// outs: [B, H, S_q, D_v] each, lses: [B, H, S_q] each. The gradients come back stacked, the parts
// along a new first dimension; one that is not needed comes back without elements.
STABLE_TORCH_LIBRARY_FRAGMENT(online_attention, m) {
  m.def("merge(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_backward(Tensor? dout, Tensor? dlse, Tensor[] outs, Tensor[] lses, "
      "bool needs_d_outs, bool needs_d_lses) -> (Tensor d_outs, Tensor d_lses)");
}
STABLE_TORCH_LIBRARY_IMPL(online_attention, CPU, m) {
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_backward", TORCH_BOX(&merge_backward));
}
STABLE_TORCH_LIBRARY_IMPL(online_attention, CUDA, m) {
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_backward", TORCH_BOX(&merge_backward));
}

}  // namespace online_attention::bindings
