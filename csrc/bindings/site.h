// SPDX-License-Identifier: BSD-3-Clause
// Where an operator runs: its device, made current, that device's stream and torch's threads.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/launch.h"

namespace online_attention::bindings {

using torch::stable::Tensor;

// Throws std::runtime_error with the sentence of a status that is not kOk.
void check_status(Status status);

// Where a call runs, with that device current while this lives.
struct Site {
  explicit Site(const Tensor& input);

  Launch launch;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

}  // namespace online_attention::bindings
