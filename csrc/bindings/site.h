// SPDX-License-Identifier: BSD-3-Clause
// Where an operator runs: its device, made current, that device's stream and torch's threads.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "bindings/tensors.h"
#include "registry.h"

namespace online_attention::bindings {

// Throws std::runtime_error with the sentence of a status that is not kOk.
void check_status(Status status);

// Where a call runs, with that device current while this lives.
struct Site {
  explicit Site(const Tensor& input);

  Launch launch;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

// Runs a pass at a site, with the workspace it asks for.
template <typename Args>
void run(const Pass<Args>& pass, const Args& args, const Site& site, const Tensor& input) {
  Launch launch = site.launch;
  std::optional<Tensor> workspace;  // given back to torch's allocator in the order of the stream
  if (const int64_t bytes = pass.workspace_bytes(args, launch.device); bytes > 0) {
    workspace = empty_bytes(input, bytes);
    launch.workspace = workspace->data_ptr();
  }
  check_status(pass.run(args, launch));
}

}  // namespace online_attention::bindings
