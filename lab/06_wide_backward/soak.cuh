// SPDX-License-Identifier: BSD-3-Clause
// Calls whose key tiles add to dQ in order, side by side: part of backward.cu.
#pragma once

// Takes multiprocessors away for a while.
__global__ void __launch_bounds__(32) occupy(uint64_t ns) {
  const uint64_t begin = global_ns();
  while (global_ns() - begin < ns) __nanosleep(1000);
}

// Calls in order on two streams side by side, while few multiprocessors are left: the same bits.
int soak(int runs) {
  const int64_t elements = int64_t{2} * 8 * 1312 * 256;
  const size_t bytes = size_t{200} << 20;
  struct Side {
    cudaStream_t stream;
    void* memory;
    __nv_bfloat16* gradients;
  } sides[2];
  for (Side& side : sides) {
    CHECK(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
    CHECK(cudaMalloc(&side.memory, bytes));
    CHECK(cudaMalloc(&side.gradients, 3 * elements * 2));
  }
  cudaStream_t busy;
  CHECK(cudaStreamCreateWithFlags(&busy, cudaStreamNonBlocking));
  constexpr int kBusyBytes = 227 << 10;
  CHECK(cudaFuncSetAttribute(occupy, cudaFuncAttributeMaxDynamicSharedMemorySize, kBusyBytes));
  __nv_bfloat16* inputs[5];
  for (int i = 0; i < 5; ++i) {
    CHECK(cudaMalloc(&inputs[i], elements * 2));
    fill_kernel<<<256, 256>>>(inputs[i], elements, 7 + i, 1.0f);
  }
  float* lse;
  CHECK(cudaMalloc(&lse, elements));
  int failed = 0;
  for (const Variant& variant : kVariants) {
    for (int mask = 0; mask < (variant.config.masked ? 4 : 1); ++mask) {
      const int64_t S = 1301, D = variant.config.head_dim, DV = variant.config.value_dim;
      const int64_t B = 2, H = 8, H_kv = mask % 2 ? 2 : 8;
      fill_constant<<<256, 256>>>(lse, B * H * S, std::log(float(S)) + 0.5f);
      BackwardArgs a;
      a.dtype = DType::bf16;
      a.shape = {B, H, H_kv, S, S, D, DV};
      View* views[5] = {&a.q, &a.k, &a.v, &a.out, &a.dout};
      for (int i = 0; i < 5; ++i) {
        const int64_t d = i < 2 ? D : DV, h = i == 1 || i == 2 ? H_kv : H;
        *views[i] = {inputs[i], S * h * d, d, h * d};
      }
      a.lse = lse;
      a.mask = mask_of(mask, S, S, 7);
      a.scale = ScoreScale::from(1 / std::sqrt(double(D)), a.dtype);
      a.factor = 1 / std::sqrt(double(D));
      CHECK(cudaDeviceSynchronize());
      std::vector<uint16_t> first, got(3 * elements);
      int different = 0;
      for (int run = 0; run < runs; ++run) {
        const int taken = run % 4 == 0 ? 0 : run % 4 == 1 ? 130 : run % 4 == 2 ? 101 : 60;
        if (taken > 0) occupy<<<taken, 32, kBusyBytes, busy>>>(1500000);
        for (Side& side : sides) {
          CHECK(cudaMemsetAsync(side.memory, 0xff, bytes / 4, side.stream));
          CHECK(cudaMemsetAsync(side.gradients, 0xff, 3 * elements * 2, side.stream));
        }
        for (Side& side : sides) {
          __nv_bfloat16* g = side.gradients;
          a.dq = {g, S * H * D, D, H * D};
          a.dk = {g + elements, S * H_kv * D, D, H_kv * D};
          a.dv = {g + 2 * elements, S * H_kv * DV, DV, H_kv * DV};
          const Workspace w =
              workspace_for(a, variant.config, side.memory, bytes / 4, {true, run % 3});
          RUN(prepare_wide_rows(a, w.plan, variant.config, w.buffers, side.stream));
          RUN(variant.bf16(a, w.plan, w.buffers, side.stream));
          RUN(finish_wide_dq(a, w.plan, variant.config, w.buffers, side.stream));
        }
        CHECK(cudaDeviceSynchronize());
        for (const Side& side : sides) {
          CHECK(cudaMemcpy(got.data(), side.gradients, got.size() * 2, cudaMemcpyDeviceToHost));
          if (first.empty()) first = got;
          different += got != first;
        }
      }
      std::printf("(%s) mask %d: %d of %d runs differ\n", variant.name, mask, different, 2 * runs);
      std::fflush(stdout);
      failed += different;
    }
  }
  return failed != 0;
}
