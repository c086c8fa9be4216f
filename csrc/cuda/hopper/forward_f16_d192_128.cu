// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/forward_launch.cuh"

namespace online_attention::cuda::hopper {

template Status launch_forward<__half, 192, 128, Calls::any>(const ForwardArgs&, const Launch&);

}  // namespace online_attention::cuda::hopper
