// SPDX-License-Identifier: BSD-3-Clause
// Moving registers between the warpgroups of a block. The kernel needs __launch_bounds__.
#pragma once

namespace online_attention::cuda::ptx {

// setmaxnreg.dec.sync.aligned.u32 (PTX 8.0, sm_90a): all warps of the warpgroup.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.inc.sync.aligned.u32 (PTX 8.0, sm_90a): waits until they are there.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace online_attention::cuda::ptx
