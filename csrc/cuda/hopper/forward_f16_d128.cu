// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/hopper/forward_launch.cuh"

namespace online_attention::cuda::hopper {

template Status launch_forward<__half, 128, 128, Calls::any>(const ForwardArgs&, const Launch&);
template Status launch_forward<__half, 128, 128, Calls::masked>(const ForwardArgs&, const Launch&);
template Status launch_forward<__half, 128, 128, Calls::longer>(const ForwardArgs&, const Launch&);

}  // namespace online_attention::cuda::hopper
