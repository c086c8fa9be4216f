// SPDX-License-Identifier: BSD-3-Clause
// What the experiments with Hopper backward kernels share: gradients by their definition, and
// tensors that are poisoned behind every length and compared with them.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common.cuh"

namespace online_attention::lab {

template <typename Element>
__global__ void forward_reference(BackwardArgs a, float* lse) {
  attend_by_definition<Element>(a, lse, [&](int b, int h, int q_idx, int d, float value) {
    a.out.row<Element>(b, h, q_idx)[d] = Element(value);
  });
}

// P and dS of one pair, by the threads of a block.
template <typename Element>
__device__ void pair(const BackwardArgs& a, int b, int h, int i, int j, float& p, float& ds) {
  const int h_kv = h / a.shape.group();
  const Element *q = a.q.row<const Element>(b, h, i), *k = a.k.row<const Element>(b, h_kv, j);
  const Element *o = a.out.row<const Element>(b, h, i), *g = a.dout.row<const Element>(b, h, i);
  const Element* v = a.v.row<const Element>(b, h_kv, j);
  float s = 0, dp = 0, delta = 0;
  for (int d = 0; d < a.shape.D; ++d) s += float(q[d]) * float(k[d]);
  for (int d = 0; d < a.shape.D_v; ++d) {
    dp += float(g[d]) * float(v[d]);
    delta += float(g[d]) * float(o[d]);
  }
  const int64_t row = (int64_t{b} * a.shape.H + h) * a.shape.S_q + i;
  if (a.dlse) delta -= static_cast<const float*>(a.dlse)[row];
  const float lse = static_cast<const float*>(a.lse)[row];
  p = lse == -INFINITY ? 0 : exp2f(s * float(a.scale.sign * a.scale.log2) - lse * float(kLog2e));
  ds = p * (dp - delta);
}

template <typename Element>
__global__ void dq_reference(BackwardArgs a, float* dq) {
  const int64_t row = blockIdx.x;
  const int i = row % a.shape.S_q, h = row / a.shape.S_q % a.shape.H,
            b = row / a.shape.S_q / a.shape.H;
  const KvRange keys = a.mask.kv_range(i, i + 1);
  extern __shared__ float ds[];
  for (int j = keys.begin + threadIdx.x; j < keys.end; j += blockDim.x) {
    float p;
    pair<Element>(a, b, h, i, j, p, ds[j]);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < a.shape.D; d += blockDim.x) {
    float sum = 0;
    for (int j = keys.begin; j < keys.end; ++j)
      sum += ds[j] * float(a.k.row<const Element>(b, h / a.shape.group(), j)[d]);
    dq[row * a.shape.D + d] = sum * float(a.factor);
  }
}
template <typename Element>
__global__ void dkv_reference(BackwardArgs a, float* dk, float* dv) {
  const int64_t row = blockIdx.x;
  const int j = row % a.shape.S_kv, h_kv = row / a.shape.S_kv % a.shape.H_kv,
            b = row / a.shape.S_kv / a.shape.H_kv, group = a.shape.group();
  const QRange queries = a.mask.q_range(j, j + 1, a.shape.S_q);
  extern __shared__ float pairs[];
  float* p = pairs;
  float* ds = pairs + a.shape.S_q;
  float sum_k[2] = {}, sum_v[2] = {};
  for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    __syncthreads();
    for (int i = queries.begin + threadIdx.x; i < queries.end; i += blockDim.x)
      pair<Element>(a, b, h, i, j, p[i], ds[i]);
    __syncthreads();
    for (int c = 0; c < 2; ++c) {
      const int d = threadIdx.x + c * blockDim.x;
      for (int i = queries.begin; i < queries.end; ++i) {
        if (d < a.shape.D) sum_k[c] += ds[i] * float(a.q.row<const Element>(b, h, i)[d]);
        if (d < a.shape.D_v) sum_v[c] += p[i] * float(a.dout.row<const Element>(b, h, i)[d]);
      }
    }
  }
  for (int c = 0; c < 2; ++c) {
    const int d = threadIdx.x + c * blockDim.x;
    if (d < a.shape.D) dk[row * a.shape.D + d] = sum_k[c] * float(a.factor);
    if (d < a.shape.D_v) dv[row * a.shape.D_v + d] = sum_v[c];
  }
}

__global__ void fill_constant(float* x, int64_t size, float value) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x)
    x[i] = value;
}

template <typename Element>
struct Tensor {  // (B, S, H, D) memory, poisoned behind every length
  View view;
  int64_t B, H, S, D, S_all, D_all;
  std::vector<uint16_t> host;
  int64_t size() const { return B * S_all * H * D_all; }
  Tensor(int64_t B, int64_t H, int64_t S, int64_t D, int pad, uint32_t seed)
      : B(B), H(H), S(S), D(D), S_all(S + 24), D_all(D + pad) {
    void* device;
    CHECK(cudaMalloc(&device, size() * 2 + 256));
    CHECK(cudaMemset(device, 0xff, size() * 2 + 256));
    view = {device, S_all * H * D_all, D_all, H * D_all};
    host.assign(size(), 0xffff);
    if (seed == 0) return;
    Element* dense;
    CHECK(cudaMalloc(&dense, B * H * S * D * 2 + 16));
    fill_kernel<<<256, 256>>>(dense, B * H * S * D, seed, 1.0f);
    std::vector<uint16_t> values(B * H * S * D);
    CHECK(cudaMemcpy(values.data(), dense, values.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaFree(dense));
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < S; ++t)
        for (int64_t h = 0; h < H; ++h)
          std::memcpy(&host[((b * S_all + t) * H + h) * D_all], &values[((b * S + t) * H + h) * D],
                      D * 2);
    put();
  }
  ~Tensor() { CHECK(cudaFree(view.data)); }
  void put() { CHECK(cudaMemcpy(view.data, host.data(), size() * 2, cudaMemcpyHostToDevice)); }
  void poison(std::mt19937& rng, bool rows, float value) {
    for (int n = 0; n < 2; ++n) {
      const int64_t b = rng() % B, t = rng() % S, h = rng() % H;
      const int64_t columns = rows ? D : 1 + rng() % D;
      const Element e = Element(value);
      for (int64_t d = 0; d < columns; ++d)
        std::memcpy(&host[((b * S_all + t) * H + h) * D_all + d], &e, 2);
    }
    put();
  }
  std::vector<uint16_t> get() const {
    std::vector<uint16_t> got(size());
    CHECK(cudaMemcpy(got.data(), view.data, size() * 2, cudaMemcpyDeviceToHost));
    return got;
  }
  // Against [B, H, S, D] floats.
  std::string compare(const float* device, double limit, bool& good) const {
    std::vector<float> want(B * H * S * D);
    CHECK(cudaMemcpy(want.data(), device, want.size() * 4, cudaMemcpyDeviceToHost));
    const std::vector<uint16_t> got = get();
    double error = 0, norm = 0, most = 0;
    int64_t wrong_class = 0, outside = 0, first_bad = -1;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < S_all; ++t)
        for (int64_t h = 0; h < H; ++h)
          for (int64_t d = 0; d < D_all; ++d) {
            const uint16_t bits = got[((b * S_all + t) * H + h) * D_all + d];
            if (t >= S || d >= D) {
              outside += bits != 0xffff;
              continue;
            }
            Element e;
            std::memcpy(&e, &bits, 2);
            const int64_t at = ((b * H + h) * S + t) * D + d;
            const float x = float(e), y = want[at];
            if (std::isfinite(x) != std::isfinite(y)) {
              ++wrong_class;
              if (first_bad < 0) first_bad = at;
              continue;
            }
            if (!std::isfinite(y)) continue;
            error += double(x - y) * (x - y);
            norm += double(y) * y;
            most = std::max<double>(most, std::fabs(x - y) - 0.03 * std::fabs(y));
          }
    error = std::sqrt(error / std::max(norm, 1e-20));
    const double rms = std::sqrt(norm / std::max<double>(want.size(), 1));
    // A gradient that is zero but for rounding has no relative error.
    const bool fine = (error < limit || rms < 1e-3) && most < 0.05 + 0.2 * rms &&
                      wrong_class == 0 && outside == 0;
    good &= fine;
    char text[200];
    std::snprintf(text, sizeof text, "%s%.1e most %.1e rms %.1e class %ld out %ld%s",
                  fine ? "" : "!!", error, most, rms, long(wrong_class), long(outside),
                  first_bad < 0 ? "" : (" at " + std::to_string(first_bad)).c_str());
    return text;
  }
};

}  // namespace online_attention::lab
