// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/tensor_core_launch.cuh"

template online_attention::Status
online_attention::cuda::portable::launch_tensor_core<__half, 64, true>(const ForwardArgs&,
                                                                       const TilePlan&,
                                                                       const Launch&);
