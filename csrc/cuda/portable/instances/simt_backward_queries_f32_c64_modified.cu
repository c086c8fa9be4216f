// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/simt_backward_queries_launch.cuh"

namespace online_attention::cuda::portable {

template Status launch_simt_backward_queries<float, 64, true, true>(const BackwardArgs&,
                                                                    const BackwardPlan&,
                                                                    const Launch&);

}  // namespace online_attention::cuda::portable
