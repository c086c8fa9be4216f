// SPDX-License-Identifier: BSD-3-Clause
// csrc/cuda/hopper/wide_backward_config.h and wide_backward_buffers.h.
#include "cuda/hopper/wide_backward_buffers.h"

#include "module.h"

namespace whitebox {

namespace oa = online_attention;

void bind_wide_backward(py::module_& module) {
  using oa::cuda::hopper::kWideBackward;
  using oa::cuda::hopper::WideBackwardConfig;

  py::class_<WideBackwardConfig>(module, "WideBackwardConfig")
      .def_readonly("head_dim", &WideBackwardConfig::head_dim)
      .def_readonly("value_dim", &WideBackwardConfig::value_dim)
      .def_readonly("masked", &WideBackwardConfig::masked)
      .def("dq_floats", &WideBackwardConfig::dq_floats)
      .def("offsets",
           [](const WideBackwardConfig& c) {
             return std::vector<int>{0,
                                     c.v_offset(),
                                     c.other_k_offset(),
                                     c.q_offset(),
                                     c.dout_offset(),
                                     c.pairs_offset(),
                                     c.other_ds_offset(),
                                     c.terms_offset(),
                                     c.marks_offset(),
                                     c.barrier_offset(),
                                     c.tile_offset(),
                                     c.smem_bytes()};
           })
      .def("dq_place", [](const WideBackwardConfig& c, int index) {
        const oa::cuda::hopper::DqPlace at = oa::cuda::hopper::dq_place(c, index);
        return std::pair{at.query, at.column};
      });

  // The plan, and whether key tiles add to dQ in order.
  module.def(
      "plan_wide_backward",
      [](const oa::Shape& shape, const oa::Mask& mask, bool deterministic, int multiprocessors) {
        oa::BackwardArgs args;  // without tensors
        args.dtype = oa::DType::bf16;
        args.shape = shape;
        args.mask = mask;
        args.deterministic = deterministic;
        const bool ordered = oa::cuda::hopper::adds_in_order(args);
        return std::tuple{oa::cuda::hopper::plan_wide_blocks(args, ordered, multiprocessors),
                          ordered};
      },
      py::kw_only(), py::arg("shape"), py::arg("mask"), py::arg("deterministic"),
      py::arg("multiprocessors"));

  module.def("wide_backward_configs", [] {
    return std::vector<WideBackwardConfig>{
        kWideBackward<192, 128, false>, kWideBackward<192, 128, true>,
        kWideBackward<192, 192, false>, kWideBackward<192, 192, true>,
        kWideBackward<256, 256, false>, kWideBackward<256, 256, true>};
  });
}

}  // namespace whitebox
