// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/tensor_core_backward_launch.cuh"

template online_attention::Status
online_attention::cuda::portable::launch_tensor_core_backward<__half, 64>(const BackwardArgs&,
                                                                          const BackwardPlan&,
                                                                          const BackwardBuffers&,
                                                                          SmemClass, const Launch&);
