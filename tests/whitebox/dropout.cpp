// SPDX-License-Identifier: BSD-3-Clause
// csrc/core/dropout.h.
#include "core/dropout.h"

#include <array>

#include "module.h"

namespace whitebox {

void bind_dropout(py::module_& module) {
  using online_attention::Dropout;
  using online_attention::Philox4x32;

  module.def(
      "philox4x32",
      [](const std::array<uint32_t, 4>& counter, uint64_t key) {
        const uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
        const Philox4x32 bits = Philox4x32::of(words, key);
        return std::array<uint32_t, 4>{bits.words[0], bits.words[1], bits.words[2], bits.words[3]};
      },
      py::arg("counter"), py::arg("key"));

  // Holds the state that Dropout points to.
  struct Bound {
    std::array<uint64_t, 2> state;
    double probability;
    Dropout dropout() const { return Dropout::of(probability, state.data()); }
  };
  py::class_<Bound>(module, "Dropout")
      .def(py::init([](double probability, uint64_t key, uint64_t last) {
             return Bound{{key, last}, probability};
           }),
           py::arg("probability"), py::arg("key") = 0, py::arg("last") = 0)
      .def_property_readonly("threshold", [](const Bound& b) { return b.dropout().threshold; })
      .def_property_readonly("keep_scale",
                             [](const Bound& b) { return b.dropout().keep_scale<double>(); })
      .def("keeps", [](const Bound& b, int64_t head, int32_t q_idx,
                       int32_t kv_idx) { return b.dropout().keeps(head, q_idx, kv_idx); })
      .def_static("call_of", &Dropout::call_of)
      .def_static("element_of", &Dropout::element_of);
}

}  // namespace whitebox
