// SPDX-License-Identifier: BSD-3-Clause
// Kernels that start while the one before them on their stream still runs (programmatic dependent
// launch, see launch_after).
#pragma once

namespace online_attention::cuda::ptx {

// griddepcontrol.wait (PTX 7.8, sm_90): until the kernel before has ended and what it wrote is
// seen. Returns at once if this one was launched in the ordinary way.
__device__ __forceinline__ void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// griddepcontrol.launch_dependents (PTX 7.8, sm_90): the kernel behind may start once every block
// has said so or ended.
__device__ __forceinline__ void let_kernel_behind_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace online_attention::cuda::ptx
