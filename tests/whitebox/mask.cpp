// SPDX-License-Identifier: BSD-3-Clause
// csrc/core/mask.h.
#include "core/mask.h"

#include "module.h"

namespace whitebox {

void bind_mask(py::module_& module) {
  using online_attention::Alignment;
  using online_attention::KvRange;
  using online_attention::Mask;

  py::enum_<Alignment>(module, "Alignment")
      .value("top_left", Alignment::top_left)
      .value("bottom_right", Alignment::bottom_right);

  py::class_<KvRange>(module, "KvRange")
      .def_readonly("begin", &KvRange::begin)
      .def_readonly("end", &KvRange::end)
      .def("size", &KvRange::size);

  py::class_<Mask>(module, "Mask")
      .def_readonly("s_kv", &Mask::s_kv)
      .def_readonly("diagonal_min", &Mask::diagonal_min)
      .def_readonly("diagonal_max", &Mask::diagonal_max)
      .def_static("window", &Mask::window, py::arg("s_q"), py::arg("s_kv"), py::arg("alignment"),
                  py::arg("left"), py::arg("right"))
      .def_static("full", &Mask::full, py::arg("s_kv"))
      .def_static("causal", &Mask::causal, py::arg("s_q"), py::arg("s_kv"), py::arg("alignment"))
      .def("is_banded", &Mask::is_banded)
      .def("visible", &Mask::visible)
      .def("kv_range", &Mask::kv_range)
      .def("q_range", &Mask::q_range)
      .def("tile_needs_mask", &Mask::tile_needs_mask);

  module.attr("UNBOUNDED") = Mask::kUnbounded;
}

}  // namespace whitebox
