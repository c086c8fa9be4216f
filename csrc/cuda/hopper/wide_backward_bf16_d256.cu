// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/wide_backward_launch.cuh"

namespace online_attention::cuda::hopper {

template Status launch_wide_backward<__nv_bfloat16, 256, 256, false>(const BackwardArgs&,
                                                                     const BackwardPlan&,
                                                                     const WideBackwardBuffers&,
                                                                     const Launch&);
template Status launch_wide_backward<__nv_bfloat16, 256, 256, true>(const BackwardArgs&,
                                                                    const BackwardPlan&,
                                                                    const WideBackwardBuffers&,
                                                                    const Launch&);

}  // namespace online_attention::cuda::hopper
