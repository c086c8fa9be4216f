// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/portable/simt_launch.cuh"

namespace online_attention::cuda::portable {

template TileShape simt_tile<__half, 128, 64>(int64_t);
template Status launch_simt<__half, 128, 64>(const ForwardArgs&, const TilePlan&, const Launch&);

}  // namespace online_attention::cuda::portable
