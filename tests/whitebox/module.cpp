// SPDX-License-Identifier: BSD-3-Clause
#include "module.h"

PYBIND11_MODULE(whitebox, module) {
  module.doc() = "csrc/core and the plans of csrc/cpu and csrc/cuda as Python sees them";
  whitebox::bind_softmax_row(module);
  whitebox::bind_mask(module);
  whitebox::bind_problem(module);
  whitebox::bind_split_keys(module);
  whitebox::bind_dropout(module);
  whitebox::bind_tile_plan(module);
  whitebox::bind_backward_plan(module);
  whitebox::bind_hopper_forward(module);
  whitebox::bind_hopper_backward(module);
  whitebox::bind_wide_backward(module);
}
