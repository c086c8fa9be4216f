// SPDX-License-Identifier: BSD-3-Clause
// csrc/cuda/hopper/forward_plan.h.
#include "cuda/hopper/forward_plan.h"

#include "module.h"

namespace whitebox {

void bind_hopper_forward(py::module_& module) {
  using online_attention::ForwardArgs;
  using online_attention::cuda::hopper::Calls;
  using online_attention::cuda::hopper::ForwardPlan;
  using online_attention::cuda::hopper::kForward;

  py::class_<ForwardPlan>(module, "HopperForwardPlan")
      .def_readonly("tiles", &ForwardPlan::tiles)
      .def_readonly("first_query", &ForwardPlan::first_query)
      .def_readonly("last_query", &ForwardPlan::last_query)
      .def_readonly("counts", &ForwardPlan::counts)
      .def("workspace_bytes", &ForwardPlan::workspace_bytes);

  // With tiles of 128 queries and 128 keys.
  module.def("plan_hopper_forward", [](const ForwardArgs& args, int multiprocessors) {
    return online_attention::cuda::hopper::plan_forward(args, kForward<128, 128, Calls::any>,
                                                        multiprocessors);
  });
}

}  // namespace whitebox
