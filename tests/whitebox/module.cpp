// SPDX-License-Identifier: BSD-3-Clause
#include "module.h"

PYBIND11_MODULE(whitebox, module) {
  module.doc() = "csrc/core as Python sees it";
  whitebox::bind_softmax_row(module);
  whitebox::bind_mask(module);
  whitebox::bind_problem(module);
}
