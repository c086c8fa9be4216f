// SPDX-License-Identifier: BSD-3-Clause
// One problem of the CPU kernels on one thread and without Python, for profilers. See README.md for
// how to build it.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/instruction_set.h"

namespace {

using namespace online_attention;

std::byte* lines(int64_t bytes) {
  return static_cast<std::byte*>(
      ::operator new(static_cast<std::size_t>(bytes) + 64, std::align_val_t{64}));
}

// [1, H, S, D], normally distributed, each anew: with q equal to k the scores would be large.
View random(DType dtype, int64_t H, int64_t S, int64_t D) {
  std::byte* const data = lines(H * S * D * element_bytes(dtype));
  static std::mt19937 bits;
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < H * S * D; ++i) {
    const float x = normal(bits);
    const char* const from = reinterpret_cast<const char*>(&x) + (dtype == DType::bf16 ? 2 : 0);
    std::memcpy(data + i * element_bytes(dtype), from,
                static_cast<std::size_t>(element_bytes(dtype)));
  }
  return {data, H * S * D, S * D, D};
}

}  // namespace

int main(int count, char** words) {
  if (count != 8) return std::puts("one_thread f32|bf16 forward|backward H S D causal repeats"), 1;
  const DType dtype = std::strcmp(words[1], "bf16") == 0 ? DType::bf16 : DType::f32;
  const bool is_backward = std::strcmp(words[2], "backward") == 0;
  const int64_t H = std::atoi(words[3]), S = std::atoi(words[4]), D = std::atoi(words[5]);
  const bool causal = std::atoi(words[6]) != 0;
  const int repeats = std::atoi(words[7]);
  const Shape shape = {.B = 1, .H = H, .H_kv = H, .S_q = S, .S_kv = S, .D = D, .D_v = D};
  const auto s = static_cast<int32_t>(S);
  const Mask mask = causal ? Mask::causal(s, s, Alignment::top_left) : Mask::full(s);
  const View q = random(dtype, H, S, D), k = random(dtype, H, S, D), v = random(dtype, H, S, D);
  const View out = random(dtype, H, S, D), dout = random(dtype, H, S, D);
  void* const lse = lines(H * S * 4);
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  const auto log2 = ScoreScale::from(scale, dtype);
  ForwardArgs forward{.dtype = dtype,
                      .shape = shape,
                      .q = q,
                      .k = k,
                      .v = v,
                      .out = out,
                      .lse = lse,
                      .mask = mask,
                      .scale = log2};
  BackwardArgs backward{.dtype = dtype,
                        .shape = shape,
                        .q = q,
                        .k = k,
                        .v = v,
                        .out = out,
                        .dout = dout,
                        .lse = lse,
                        .dq = random(dtype, H, S, D),
                        .dk = random(dtype, H, S, D),
                        .dv = random(dtype, H, S, D),
                        .mask = mask,
                        .scale = log2,
                        .factor = scale};
  Launch launch;
  launch.parallel_for = [](int64_t size, int64_t, ParallelBody body, void* context) {
    body(0, size, context);
  };
  launch.workspace = lines(cpu::backward_workspace_bytes(backward, {}) +
                           cpu::forward_workspace_bytes(forward, {}) + 256);
  cpu::forward(forward, launch);
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    is_backward ? cpu::backward(backward, launch) : cpu::forward(forward, launch);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = seconds.count() < best ? seconds.count() : best;
  }
  const double flops =
      static_cast<double>(H * S * S * D) * (is_backward ? 10 : 4) / (causal ? 2 : 1);
  std::printf("%s: %.0f us, %.1f GFLOP/s\n", cpu::instruction_set(), best * 1e6,
              flops / best / 1e9);
}
