// SPDX-License-Identifier: BSD-3-Clause
// csrc/cuda/hopper/backward_config.h and backward_buffers.h.
#include "cuda/hopper/backward_config.h"

#include "cuda/hopper/backward_buffers.h"
#include "module.h"

namespace whitebox {

namespace oa = online_attention;

void bind_hopper_backward(py::module_& module) {
  using oa::cuda::hopper::BackwardConfig;
  using oa::cuda::hopper::kBackward;

  py::class_<BackwardConfig>(module, "HopperBackwardConfig")
      .def_readonly("head_dim", &BackwardConfig::head_dim)
      .def_readonly("tile_m", &BackwardConfig::tile_m)
      .def_readonly("masked", &BackwardConfig::masked)
      .def("columns", [](const BackwardConfig& c) { return c.boxes() * BackwardConfig::kColumns; })
      .def("dq_floats", &BackwardConfig::dq_floats)
      .def("dq_warps", &BackwardConfig::dq_warps)
      .def("dq_group_bytes", &BackwardConfig::dq_group_bytes)
      .def("dq_queries", &BackwardConfig::dq_queries)
      .def("terms_bytes", &BackwardConfig::terms_bytes)
      .def("offsets",
           [](const BackwardConfig& c) {
             return std::vector<int>{0,
                                     c.v_offset(),
                                     c.q_offset(),
                                     c.dout_offset(),
                                     c.ds_offset(),
                                     c.dq_offset(),
                                     c.sums_offset(),
                                     c.terms_offset(),
                                     c.marks_offset(),
                                     c.barrier_offset(),
                                     c.tile_offset(),
                                     c.task_offset(),
                                     c.step_offset(),
                                     c.smem_bytes()};
           })
      .def("term_place", [](const BackwardConfig& c, int row) { return c.term_place(row); })
      .def("dq_place", [](const BackwardConfig& c, int index) {
        const oa::cuda::hopper::DqPlace at = oa::cuda::hopper::dq_place(c, index);
        return std::pair{at.query, at.column};
      });

  module.def("hopper_adders_of", [](const oa::cuda::BackwardPlan& plan, const oa::Shape& shape,
                                    const oa::Mask& mask, int32_t q_tile) {
    oa::BackwardArgs args;
    args.shape = shape;
    args.mask = mask;
    const oa::IndexRange adders = oa::cuda::hopper::adders_of(args, plan, q_tile);
    return std::pair{adders.begin, adders.end};
  });

  // The plan, whether key tiles add to dQ in order, and how many blocks are started.
  module.def(
      "plan_hopper_backward",
      [](const BackwardConfig& config, const oa::Shape& shape, const oa::Mask& mask,
         bool deterministic, int multiprocessors) {
        oa::BackwardArgs args;  // without tensors
        args.dtype = oa::DType::bf16;
        args.shape = shape;
        args.mask = mask;
        args.deterministic = deterministic;
        const auto plan = oa::cuda::hopper::plan_blocks(args, config, multiprocessors);
        return std::tuple{plan, oa::cuda::hopper::adds_in_order(args, plan),
                          oa::cuda::hopper::blocks_of(plan, multiprocessors)};
      },
      py::kw_only(), py::arg("config"), py::arg("shape"), py::arg("mask"), py::arg("deterministic"),
      py::arg("multiprocessors"));

  module.def("hopper_backward_configs", [] {
    return std::vector<BackwardConfig>{kBackward<64, false>,  kBackward<64, true>,
                                       kBackward<96, false>,  kBackward<96, true>,
                                       kBackward<128, false>, kBackward<128, true>};
  });
}

}  // namespace whitebox
