// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/simt_launch.cuh"

namespace online_attention::cuda::portable {

template TileShape simt_tile<double, 64, 32>(int64_t);
template Status launch_simt<double, 64, 32>(const ForwardArgs&, const TilePlan&, const Launch&);

}  // namespace online_attention::cuda::portable
