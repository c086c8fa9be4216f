// SPDX-License-Identifier: BSD-3-Clause
// What the experiments with Hopper kernels share: what ends a run that fails, random inputs, masks
// by number, and attention by its definition, a thread block for each query.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "core/mask.h"
#include "core/problem.h"

#define CHECK(call)                                                             \
  do {                                                                          \
    const cudaError_t error = (call);                                           \
    if (error != cudaSuccess) {                                                 \
      std::printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(error)); \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)
#define RUN(call)                                    \
  do {                                               \
    const online_attention::Status status_ = (call); \
    if (status_ != online_attention::kOk) {          \
      std::printf("launch: %s\n", status_);          \
      std::exit(1);                                  \
    }                                                \
  } while (0)

namespace online_attention::lab {

// Normal numbers, the same for a seed whatever the launch.
template <typename Element>
__global__ void fill_kernel(Element* x, int64_t size, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const float u = ((z >> 40) + 1) * 0x1p-24f, w = (z & 0xffffff) * 0x1p-24f;
    x[i] = Element(scale * sqrtf(-2 * logf(u)) * cospif(2 * w));
  }
}

// 0 full, 1 causal top left, 2 causal bottom right, 3 a window whose sides depend on the seed.
inline Mask mask_of(int number, int S_q, int S_kv, uint32_t seed) {
  if (number == 0) return Mask::full(S_kv);
  if (number == 1) return Mask::causal(S_q, S_kv, Alignment::top_left);
  if (number == 2) return Mask::causal(S_q, S_kv, Alignment::bottom_right);
  return Mask::window(S_q, S_kv, Alignment::bottom_right, 37 + seed % 200,
                      seed % 3 ? int(seed % 50) : 0);
}

// The query of this thread block: store(b, h, q_idx, d, value) for each column of its output, and
// its lse. Takes S_kv floats of shared memory.
template <typename Element, typename Args, typename Store>
__device__ void attend_by_definition(const Args& a, float* lse, Store store) {
  const int64_t row = blockIdx.x;
  const int q_idx = row % a.shape.S_q, h = row / a.shape.S_q % a.shape.H,
            b = row / a.shape.S_q / a.shape.H;
  const int h_kv = h / a.shape.group();
  const KvRange keys = a.mask.kv_range(q_idx, q_idx + 1);
  extern __shared__ float scores[];
  const Element* q = a.q.template row<const Element>(b, h, q_idx);
  const float scale = float(a.scale.sign * a.scale.log2);
  for (int j = keys.begin + threadIdx.x; j < keys.end; j += blockDim.x) {
    const Element* k = a.k.template row<const Element>(b, h_kv, j);
    float s = 0;
    for (int d = 0; d < a.shape.D; ++d) s += float(q[d]) * float(k[d]);
    scores[j] = s * scale;
  }
  __syncthreads();
  float m = -INFINITY, l = 0;
  for (int j = keys.begin; j < keys.end; ++j) m = fmaxf(m, scores[j]);
  for (int j = keys.begin; j < keys.end; ++j) l += exp2f(scores[j] - m);
  for (int d = threadIdx.x; d < a.shape.D_v; d += blockDim.x) {
    float o = 0;
    for (int j = keys.begin; j < keys.end; ++j)
      o += exp2f(scores[j] - m) * float(a.v.template row<const Element>(b, h_kv, j)[d]);
    store(b, h, q_idx, d, keys.size() ? o / l : 0);
  }
  if (threadIdx.x == 0) lse[row] = keys.size() ? float((m + log2f(l)) * kLn2) : -INFINITY;
}

}  // namespace online_attention::lab
