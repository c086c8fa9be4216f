// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/backward_launch.cuh"

template online_attention::Status
online_attention::cuda::hopper::launch_backward<__half, 128>(const BackwardArgs&,
    const BackwardPlan&, const BackwardBuffers&, const Launch&);
