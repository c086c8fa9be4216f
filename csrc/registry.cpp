// SPDX-License-Identifier: BSD-3-Clause
#include "registry.h"

#include <iterator>
#include <limits>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/merge.h"

// The only place of the project where a build with CUDA kernels differs from one without.
#if ONLINE_ATTENTION_WITH_CUDA
#include "cuda/device.h"
#include "cuda/hopper/backward.h"
#include "cuda/hopper/config.h"
#include "cuda/hopper/forward.h"
#include "cuda/merge.h"
#include "cuda/portable/backward.h"
#include "cuda/portable/forward.h"
#endif

namespace online_attention {
namespace {

constexpr int kAnyArch = std::numeric_limits<int>::max();
constexpr int64_t kAnyHeadDim = 0;
constexpr DTypeSet kHalfTypes = {.f16 = true, .bf16 = true};
constexpr DTypeSet kAllTypes = {.f16 = true, .bf16 = true, .f32 = true, .f64 = true};

template <typename Args>
int64_t no_workspace(const Args&, const Device&) {
  return 0;
}

constexpr Runner kRunners[] = {
#if ONLINE_ATTENTION_WITH_CUDA
    // sm_90a runs on compute capability 9.0 alone.
    {.name = "cuda.hopper.wgmma",
     .device = DeviceKind::cuda,
     .arch_min = 90,
     .arch_max = 90,
     .dtypes = kHalfTypes,
     .head_dim_max = cuda::hopper::kHeadDimMax,
     .forward = {cuda::hopper::forward_workspace_bytes, cuda::hopper::forward},
     .backward = {cuda::hopper::backward_workspace_bytes, cuda::hopper::backward},
     .runs_forward = cuda::hopper::runs_forward,
     .runs_backward = cuda::hopper::runs_backward,
     .leaves = "a bias, dropout, fewer than 64 queries of a group of heads or rows off 16-byte "
               "boundaries",
     .leaves_backward = "a bias, dropout, fewer than 64 queries or rows off 16-byte boundaries"},
    {.name = "cuda.portable.tensor_core",
     .device = DeviceKind::cuda,
     .arch_min = 80,
     .arch_max = kAnyArch,
     .dtypes = kHalfTypes,
     .head_dim_max = 256,
     .forward = {cuda::portable::tensor_core_workspace_bytes, cuda::portable::tensor_core_forward},
     .backward = {cuda::portable::tensor_core_backward_workspace_bytes,
                  cuda::portable::tensor_core_backward}},
    // Turing's tensor cores know no bfloat16.
    {.name = "cuda.portable.tensor_core",
     .device = DeviceKind::cuda,
     .arch_min = 75,
     .arch_max = 79,
     .dtypes = {.f16 = true},
     .head_dim_max = 256,
     .forward = {cuda::portable::tensor_core_workspace_bytes, cuda::portable::tensor_core_forward},
     .backward = {cuda::portable::tensor_core_backward_workspace_bytes,
                  cuda::portable::tensor_core_backward}},
    {.name = "cuda.portable.simt",
     .device = DeviceKind::cuda,
     .arch_min = 75,
     .arch_max = kAnyArch,
     .dtypes = kAllTypes,
     .head_dim_max = kAnyHeadDim,
     .forward = {cuda::portable::simt_workspace_bytes, cuda::portable::simt_forward},
     .backward = {cuda::portable::simt_backward_workspace_bytes, cuda::portable::simt_backward}},
#endif
    {.name = "cpu.tiled",
     .device = DeviceKind::cpu,
     .arch_min = 0,
     .arch_max = 0,
     .dtypes = kAllTypes,
     .head_dim_max = kAnyHeadDim,
     .forward = {cpu::forward_workspace_bytes, cpu::forward},
     .backward = {cpu::backward_workspace_bytes, cpu::backward}},
};

constexpr MergePasses kCpuMerge = {
    .forward = {no_workspace<MergeArgs>, cpu::merge},
    .backward = {no_workspace<MergeBackwardArgs>, cpu::merge_backward}};
#if ONLINE_ATTENTION_WITH_CUDA
constexpr MergePasses kCudaMerge = {
    .forward = {cuda::merge_workspace_bytes, cuda::merge},
    .backward = {cuda::merge_workspace_bytes, cuda::merge_backward}};
#else
constexpr MergePasses kCudaMerge = {};  // no CUDA device is ever described, so none asks
#endif

std::string capability(int arch) {
  return std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

// Why a row of the right device does not take a problem, as a clause; empty if it does.
std::string mismatch(const Runner& row, DType dtype, const Shape& shape, int arch) {
  if (arch < row.arch_min) {
    return "compute capability " + capability(arch) + " is below " + capability(row.arch_min);
  }
  if (arch > row.arch_max) {
    return "compute capability " + capability(arch) + " is above " + capability(row.arch_max);
  }
  if (!row.dtypes.contains(dtype)) {
    return std::string("dtype ") + name_of(dtype) + " is not among its dtypes";
  }
  const int64_t head_dim = shape.D > shape.D_v ? shape.D : shape.D_v;
  if (row.head_dim_max != kAnyHeadDim && head_dim > row.head_dim_max) {
    return "head_dim " + std::to_string(head_dim) + " is above " + std::to_string(row.head_dim_max);
  }
  return {};
}

bool takes(const Runner& row, DType dtype, const Shape& shape, const Device& device) {
  return row.device == device.kind && mismatch(row, dtype, shape, device.arch).empty();
}

// The first row that takes the problem and, as `runs` tells, this call of it.
template <typename Args>
const Runner& find_running(const Args& args, const Device& device,
                           bool (*Runner::*runs)(const Args&, const Device&)) {
  const Runner* last = nullptr;
  for (const Runner& row : runners()) {
    if (!takes(row, args.dtype, args.shape, device)) continue;
    last = &row;
    if (row.*runs == nullptr || (row.*runs)(args, device)) break;
  }
  return *last;
}

// Rows for another generation say nothing about a problem on this one.
bool is_near(const Runner& row, const Device& device) {
  return row.device == device.kind && row.arch_min <= device.arch && device.arch <= row.arch_max;
}

}  // namespace

bool DTypeSet::contains(DType dtype) const {
  switch (dtype) {
    case DType::f16:
      return f16;
    case DType::bf16:
      return bf16;
    case DType::f32:
      return f32;
    case DType::f64:
      return f64;
  }
  return false;
}

RunnerTable runners() { return {kRunners, std::size(kRunners)}; }

const MergePasses& merge_passes(DeviceKind device) {
  return device == DeviceKind::cuda ? kCudaMerge : kCpuMerge;
}

bool built_with_cuda() { return ONLINE_ATTENTION_WITH_CUDA; }

Status describe_cuda_device(int index, Device& device) {
#if ONLINE_ATTENTION_WITH_CUDA
  return cuda::describe_device(index, device);
#else
  static_cast<void>(index);
  static_cast<void>(device);
  return "this build of online_attention holds no CUDA kernels";
#endif
}

const Runner* find(DType dtype, const Shape& shape, const Device& device) {
  for (const Runner& row : runners()) {
    if (takes(row, dtype, shape, device)) return &row;
  }
  return nullptr;
}

const Pass<ForwardArgs>& find_forward(const ForwardArgs& args, const Device& device) {
  return find_running(args, device, &Runner::runs_forward).forward;
}

const Pass<BackwardArgs>& find_backward(const BackwardArgs& args, const Device& device) {
  return find_running(args, device, &Runner::runs_backward).backward;
}

std::string explain(DType dtype, const Shape& shape, const Device& device) {
  const Runner* chosen = find(dtype, shape, device);
  const Runner* nearest = nullptr;  // the first row for this device that does not take the problem
  const Runner* of_device = nullptr;
  for (const Runner& row : runners()) {
    if (&row == chosen) break;
    if (row.device == device.kind) of_device = &row;
    if (nearest == nullptr && is_near(row, device)) nearest = &row;
  }
  const auto clause = [&](const Runner& row) {
    return std::string(row.name) +
           " does not take it: " + mismatch(row, dtype, shape, device.arch) + ".";
  };
  if (chosen != nullptr) {
    std::string sentence = std::string(chosen->name) + " runs this problem.";
    if (chosen->leaves != nullptr) {
      sentence +=
          std::string(" Forward calls with ") + chosen->leaves + " run on " + chosen[1].name + ".";
    }
    if (chosen->leaves_backward != nullptr) {
      sentence +=
          std::string(" Backward calls with ") + chosen->leaves_backward + " run there too.";
    }
    return nearest == nullptr ? sentence : sentence + " " + clause(*nearest);
  }
  if (nearest == nullptr) nearest = of_device;
  if (nearest == nullptr) return "Nothing runs this problem: this build holds no CUDA kernels.";
  return "Nothing runs this problem. " + clause(*nearest);
}

}  // namespace online_attention
