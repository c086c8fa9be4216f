// SPDX-License-Identifier: BSD-3-Clause
// The one table of what this library can run. Dispatch, `supported()`, `explain()`, the README's
// support table and the parametrisation of the tests are all read from it.
#pragma once

#include <cstddef>
#include <string>

#include "core/launch.h"
#include "core/merge.h"
#include "core/problem.h"

namespace online_attention {

struct DTypeSet {
  bool f16 = false, bf16 = false, f32 = false, f64 = false;
  bool contains(DType dtype) const;
};

// One pass of a runner, forward or backward.
template <typename Args>
struct Pass {
  int64_t (*workspace_bytes)(const Args&, const Device&);
  Status (*run)(const Args&, const Launch&);
};

// One runner and the problems it takes. First match wins, so faster rows stand first.
struct Runner {
  const char* name;  // folder and method, e.g. "cuda.portable.tensor_core"
  DeviceKind device;
  int arch_min, arch_max;  // inclusive; 0, 0 on a CPU
  DTypeSet dtypes;
  int64_t head_dim_max;  // of both D and D_v; 0 = any
  Pass<ForwardArgs> forward;
  Pass<BackwardArgs> backward;
  // Of the calls whose dtype and shape it takes, those whose forward or backward pass it runs: the
  // others go to the next row that takes them. nullptr: all.
  bool (*runs_forward)(const ForwardArgs&, const Device&) = nullptr;
  bool (*runs_backward)(const BackwardArgs&, const Device&) = nullptr;
  const char* leaves = nullptr;           // what those others have, for explain
  const char* leaves_backward = nullptr;  // likewise
};

struct RunnerTable {
  const Runner* rows;
  std::size_t size;
  const Runner* begin() const { return rows; }
  const Runner* end() const { return rows + size; }
};

RunnerTable runners();

// Merging and its gradients, of any dtype and sizes, on the devices of one kind.
struct MergePasses {
  Pass<MergeArgs> forward;
  Pass<MergeBackwardArgs> backward;
};
const MergePasses& merge_passes(DeviceKind device);

// Whether this build holds CUDA kernels at all.
bool built_with_cuda();

// Fills in what kernels need to know of a CUDA device. Fails in a build without CUDA.
Status describe_cuda_device(int index, Device& device);

// The first row that takes the problem; nullptr if none does.
const Runner* find(DType dtype, const Shape& shape, const Device& device);

// The pass of the first row that takes the problem and runs this call of it. `find` knows of one,
// and the last row for a device runs every call.
const Pass<ForwardArgs>& find_forward(const ForwardArgs& args, const Device& device);
const Pass<BackwardArgs>& find_backward(const BackwardArgs& args, const Device& device);

// One sentence: which row runs this problem, or which field of the nearest rows it fails.
std::string explain(DType dtype, const Shape& shape, const Device& device);

}  // namespace online_attention
