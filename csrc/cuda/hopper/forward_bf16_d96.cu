// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/forward_launch.cuh"

template online_attention::Status
online_attention::cuda::hopper::launch_forward<__nv_bfloat16, 96, 96, 128>(const ForwardArgs&,
                                                                           const Launch&);

template online_attention::Status
online_attention::cuda::hopper::launch_forward<__nv_bfloat16, 96, 96, 192>(const ForwardArgs&,
                                                                           const Launch&);
