// SPDX-License-Identifier: BSD-3-Clause
// csrc/cpu/split_keys.h.
#include "cpu/split_keys.h"

#include <utility>

#include "module.h"

namespace whitebox {

namespace oa = online_attention;

void bind_split_keys(py::module_& module) {
  using oa::cpu::KeySplit;
  py::class_<KeySplit>(module, "KeySplit")
      .def(py::init<const oa::Shape&>())
      .def_readonly("count", &KeySplit::count)
      .def("part_of", [](const KeySplit& split, int32_t begin, int32_t end, int64_t part) {
        const oa::KvRange range = split.part_of({begin, end}, part);
        return std::pair(range.begin, range.end);
      });
}

}  // namespace whitebox
