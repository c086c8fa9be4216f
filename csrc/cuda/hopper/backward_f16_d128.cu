// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/backward_launch.cuh"

namespace online_attention::cuda::hopper {

template Status launch_backward<__half, 128, false>(const BackwardArgs&, const BackwardPlan&,
                                                    const BackwardBuffers&, const Launch&);
template Status launch_backward<__half, 128, true>(const BackwardArgs&, const BackwardPlan&,
                                                   const BackwardBuffers&, const Launch&);

}  // namespace online_attention::cuda::hopper
