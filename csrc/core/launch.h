// SPDX-License-Identifier: BSD-3-Clause
// What a runner gets besides the problem: the device it runs on and the means to use it. Filled in
// by csrc/bindings, so that no kernel needs torch.
#pragma once

#include "core/hd.h"

namespace online_attention {

enum class DeviceKind : int8_t { cpu, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int arch = 0;             // CUDA: 10 * major + minor of the compute capability; 0 on a CPU
  int multiprocessors = 0;  // CUDA only
  int smem_per_block = 0;   // CUDA only: bytes of shared memory that one block can ask for
};

// Calls body(begin, end, context) on disjoint sub-ranges that cover [0, size), each of at least
// `grain` items but the last, on the threads of torch's intra-op pool; returns when all are done.
// `body` must not throw.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t size, int64_t grain, ParallelBody body, void* context);

struct Launch {
  Device device;
  ParallelFor parallel_for = nullptr;  // CPU only
  void* stream = nullptr;              // CUDA only: the cudaStream_t to launch on
  void* workspace = nullptr;           // as many bytes as the runner asked for, 256-byte aligned
};

// nullptr on success, else a sentence that stays valid for the life of the process.
using Status = const char*;
inline constexpr Status kOk = nullptr;

}  // namespace online_attention
