// SPDX-License-Identifier: BSD-3-Clause
// csrc/core/problem.h and csrc/core/estimate.h.
#include "core/problem.h"

#include "core/estimate.h"
#include "module.h"

namespace whitebox {

namespace oa = online_attention;

void bind_problem(py::module_& module) {
  py::enum_<oa::DType>(module, "DType")
      .value("f16", oa::DType::f16)
      .value("bf16", oa::DType::bf16)
      .value("f32", oa::DType::f32)
      .value("f64", oa::DType::f64);
  module.def("element_bytes", &oa::element_bytes);
  module.def("name_of", &oa::name_of);

  py::class_<oa::Shape>(module, "Shape")
      .def(py::init([](int64_t B, int64_t H, int64_t H_kv, int64_t S_q, int64_t S_kv, int64_t D,
                       int64_t D_v) { return oa::Shape{B, H, H_kv, S_q, S_kv, D, D_v}; }),
           py::kw_only(), py::arg("B"), py::arg("H"), py::arg("H_kv"), py::arg("S_q"),
           py::arg("S_kv"), py::arg("D"), py::arg("D_v"))
      .def("group", &oa::Shape::group)
      .def("empty", &oa::Shape::empty);
  module.attr("MAX_LENGTH") = oa::kMaxLength;

  py::class_<oa::ScoreScale>(module, "ScoreScale")
      .def_readonly("sign", &oa::ScoreScale::sign)
      .def_readonly("log2", &oa::ScoreScale::log2)
      .def_static("of", &oa::ScoreScale::from);  // `from` is a keyword of Python

  // Without tensors: what a plan is made from.
  py::class_<oa::ForwardArgs>(module, "ForwardArgs")
      .def(py::init([](oa::DType dtype, const oa::Shape& shape, const oa::Mask& mask,
                       bool batch_invariant) {
             oa::ForwardArgs args;
             args.dtype = dtype;
             args.shape = shape;
             args.mask = mask;
             args.batch_invariant = batch_invariant;
             return args;
           }),
           py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("mask"),
           py::arg("batch_invariant"));

  module.def("visible_pairs", &oa::visible_pairs);
  module.def("forward_flops", &oa::forward_flops);
  module.def("input_bytes", &oa::input_bytes);
  module.def("output_bytes", &oa::output_bytes);
  module.def("score_matrix_bytes", &oa::score_matrix_bytes);
  module.def("naive_traffic_bytes", &oa::naive_traffic_bytes);
  module.def("tiled_traffic_bytes", &oa::tiled_traffic_bytes);
  module.def("naive_peak_bytes", &oa::naive_peak_bytes);
  module.def("tiled_peak_bytes", &oa::tiled_peak_bytes);
}

}  // namespace whitebox
