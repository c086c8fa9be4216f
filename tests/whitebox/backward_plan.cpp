// SPDX-License-Identifier: BSD-3-Clause
// csrc/cuda/backward_plan.h.
#include "cuda/backward_plan.h"

#include "module.h"

namespace whitebox {

namespace oa = online_attention;

void bind_backward_plan(py::module_& module) {
  using oa::cuda::BackwardCoord;
  using oa::cuda::BackwardPlan;

  py::class_<BackwardCoord>(module, "BackwardCoord")
      .def_readonly("b", &BackwardCoord::b)
      .def_readonly("h_kv", &BackwardCoord::h_kv)
      .def_readonly("kv_tile", &BackwardCoord::kv_tile);

  py::class_<BackwardPlan>(module, "BackwardPlan")
      .def_readonly("tile_m", &BackwardPlan::tile_m)
      .def_readonly("tile_n", &BackwardPlan::tile_n)
      .def_readonly("group", &BackwardPlan::group)
      .def_readonly("q_tiles", &BackwardPlan::q_tiles)
      .def_readonly("kv_tiles", &BackwardPlan::kv_tiles)
      .def_readonly("heads", &BackwardPlan::heads)
      .def_readonly("heads_per_batch", &BackwardPlan::heads_per_batch)
      .def_readonly("section_heads", &BackwardPlan::section_heads)
      .def("blocks", &BackwardPlan::blocks)
      .def("dq_tiles", &BackwardPlan::dq_tiles)
      .def("locate", &BackwardPlan::locate)
      .def("turn_of", &BackwardPlan::turn_of, py::arg("mask"), py::arg("s_q"), py::arg("q_tile"),
           py::arg("kv_tile"));

  module.def(
      "plan_backward",
      [](oa::DType dtype, const oa::Shape& shape, const oa::Mask& mask, int32_t tile_m,
         int32_t tile_n, int multiprocessors) {
        oa::BackwardArgs args;  // without tensors
        args.dtype = dtype;
        args.shape = shape;
        args.mask = mask;
        return oa::cuda::plan_backward(args, tile_m, tile_n, multiprocessors);
      },
      py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("mask"), py::arg("tile_m"),
      py::arg("tile_n"), py::arg("multiprocessors"));
}

}  // namespace whitebox
