// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/simt_backward_keys_launch.cuh"

namespace online_attention::cuda::portable {

template BackwardTile simt_backward_tile<__half, 128>();
template Status launch_simt_backward_keys<__half, 128, false, true>(const BackwardArgs&,
                                                                    const BackwardPlan&,
                                                                    const Launch&);

}  // namespace online_attention::cuda::portable
