// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/simt_launch.cuh"

namespace online_attention::cuda::portable {

template TileShape simt_tile<float, 128, 64>(int64_t);
template Status launch_simt<float, 128, 64>(const ForwardArgs&, const TilePlan&, const Launch&);

}  // namespace online_attention::cuda::portable
