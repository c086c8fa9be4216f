// SPDX-License-Identifier: BSD-3-Clause
#include "bindings/site.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <stdexcept>

// Only a torch with CUDA defines it: weak, so that this library loads with any torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace online_attention::bindings {
namespace {

void parallel_for(int64_t size, int64_t grain, ParallelBody body, void* context) {
  check_torch(torch_parallel_for(0, size, grain, body, context), "torch's parallel_for");
}

const Device& cuda_device(int32_t index) {
  static std::mutex mutex;
  static std::map<int32_t, Device> seen;  // never erased: references stay valid
  const std::lock_guard lock(mutex);
  const auto found = seen.find(index);
  if (found != seen.end()) return found->second;
  Device device;
  check_status(describe_cuda_device(index, device));
  return seen.emplace(index, device).first->second;
}

void* current_cuda_stream(int32_t device_index) {
  void* stream = nullptr;
  check_torch(aoti_torch_get_current_cuda_stream == nullptr
                  ? 1
                  : aoti_torch_get_current_cuda_stream(device_index, &stream),
              "asking torch for the current CUDA stream");
  return stream;
}

}  // namespace

void check_status(Status status) {
  if (status != kOk) throw std::runtime_error(status);
}

Site::Site(const Tensor& input) : launch{.parallel_for = parallel_for} {
  if (!input.is_cuda()) return;
  const int32_t index = input.get_device_index();
  launch = {.device = cuda_device(index), .stream = current_cuda_stream(index)};
  guard.emplace(index);
}

}  // namespace online_attention::bindings
