// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/wide_backward_launch.cuh"

namespace online_attention::cuda::hopper {

template Status launch_wide_backward<__half, 192, 192, false>(const BackwardArgs&,
                                                              const BackwardPlan&,
                                                              const WideBackwardBuffers&,
                                                              const Launch&);
template Status launch_wide_backward<__half, 192, 192, true>(const BackwardArgs&,
                                                             const BackwardPlan&,
                                                             const WideBackwardBuffers&,
                                                             const Launch&);

}  // namespace online_attention::cuda::hopper
