// SPDX-License-Identifier: BSD-3-Clause
// The tests' window into the C++ headers. One file binds one header; module.cpp lists them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace whitebox {

namespace py = pybind11;

void bind_softmax_row(py::module_& module);
void bind_mask(py::module_& module);
void bind_problem(py::module_& module);
void bind_split_keys(py::module_& module);
void bind_dropout(py::module_& module);
void bind_tile_plan(py::module_& module);
void bind_backward_plan(py::module_& module);
void bind_hopper_forward(py::module_& module);
void bind_hopper_backward(py::module_& module);
void bind_wide_backward(py::module_& module);

}  // namespace whitebox
