// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/tensor_core_backward_launch.cuh"

namespace online_attention::cuda::portable {

template Status launch_tensor_core_backward<__nv_bfloat16, 192, false>(const BackwardArgs&,
                                                                       const BackwardPlan&,
                                                                       const BackwardBuffers&,
                                                                       SmemClass, const Launch&);
template Status launch_store_dq<__nv_bfloat16, 192>(const BackwardArgs&, const BackwardPlan&,
                                                    const BackwardBuffers&, SmemClass,
                                                    const Launch&);

}  // namespace online_attention::cuda::portable
