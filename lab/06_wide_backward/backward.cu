// SPDX-License-Identifier: BSD-3-Clause
// Correctness and speed of configurations of the Hopper backward kernel for wide heads. Build:
//   nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a -cudart static \
//     -DVARIANTS='"variants.inc"' lab/06_wide_backward/backward.cu \
//     csrc/cuda/hopper/tensor_map.cu csrc/cuda/hopper/wide_backward_rows.cu \
//     csrc/cuda/backward_plan.cpp
// Run: ./a.out check [cases]; ./a.out soak [runs]; ./a.out bench [part of a variant's name]
//   [shortest S] [longest]; LAB_HEADS="1 2 3": with so many heads interleaved too, in order;
//   LAB_GROUP: H / H_kv; LAB_TOKENS: B * S
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../backward.cuh"
#include "cuda/hopper/wide_backward_launch.cuh"
#include "cuda/hopper/wide_backward_rows.h"

using namespace online_attention;
using namespace online_attention::lab;
using namespace online_attention::cuda;
using namespace online_attention::cuda::hopper;

using Main = Status (*)(const BackwardArgs&, const BackwardPlan&, const WideBackwardBuffers&,
                        cudaStream_t);
struct Variant {
  const char* name;
  WideBackwardConfig config;
  int causal;  // 1: for causal calls only, 0: for full ones, 2: both
  Main bf16, f16;
};

// D, D_v, stages, masked, pair_stages, registers of dV, dK, dQ, dV and dK run on.
ONLINE_ATTENTION_HD constexpr WideBackwardConfig make(int d, int dv, int stages, int masked,
                                                      int pair_stages, int dv_registers,
                                                      int dk_registers, int dq_registers, int dv_on,
                                                      int dk_on) {
  return {.head_dim = d,
          .value_dim = dv,
          .stages = stages,
          .masked = masked != 0,
          .pair_stages = pair_stages,
          .dv_registers = dv_registers,
          .dk_registers = dk_registers,
          .dq_registers = dq_registers,
          .dv_runs_on = dv_on != 0,
          .dk_runs_on = dk_on != 0};
}
__device__ uint64_t measured[4];  // clocks and nanoseconds of a block, begin and end
__device__ uint64_t global_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

template <typename Element, int D, int DV, int... N>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WideBackwardConfig::kThreads, 1)
    lab_kernel(const __grid_constant__ WideBackwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr WideBackwardConfig config = make(D, DV, N...);
  if (blockIdx.x == 0 && threadIdx.x == 127) measured[0] = clock64(), measured[1] = global_ns();
  wide_backward_block<Element, config>(call, smem);
  if (blockIdx.x == 0 && threadIdx.x == 128) measured[2] = clock64(), measured[3] = global_ns();
}

template <typename Element, int D, int DV, int... N>
Status run(const BackwardArgs& args, const BackwardPlan& plan, const WideBackwardBuffers& buffers,
           cudaStream_t stream) {
  constexpr WideBackwardConfig config = make(D, DV, N...);
  WideBackwardCall call;
  const Status status = describe_call(args, plan, buffers, call);
  if (status != kOk) return status;
  return launch(lab_kernel<Element, D, DV, N...>, 2 * plan.blocks(), WideBackwardConfig::kThreads,
                config.smem_bytes(), stream, call);
}

#ifdef WITH_F16
#define F16(...) run<__half, __VA_ARGS__>
#else
#define F16(...) nullptr
#endif
#define VARIANT(causal, ...) \
  {#__VA_ARGS__, make(__VA_ARGS__), causal, run<__nv_bfloat16, __VA_ARGS__>, F16(__VA_ARGS__)}

const Variant kVariants[] = {
#include VARIANTS
};

struct Workspace {
  BackwardPlan plan;
  WideBackwardBuffers buffers;
};
// In which order key tiles add, and how many heads are interleaved; 0: as many as in a call.
struct Order {
  bool ordered;
  int heads;
};
Workspace workspace_for(const BackwardArgs& a, const WideBackwardConfig& config, void* memory,
                        size_t bytes, const Order& order) {
  Workspace w;
  w.plan = plan_wide_blocks(a, order.ordered, 132);
  if (order.heads > 0) {
    w.plan.section_heads = std::min(w.plan.heads, static_cast<uint32_t>(order.heads));
  }
  const size_t rows = w.plan.dq_tiles() * config.tile_m;
  const size_t sums = w.plan.dq_tiles() * config.dq_floats();
  w.buffers.dq_sums = static_cast<float*>(memory);
  w.buffers.lse2 = w.buffers.dq_sums + sums;
  w.buffers.delta = w.buffers.lse2 + rows;
  const size_t counters = counter_place(w.plan.dq_tiles(), 0);
  if (order.ordered) {
    w.buffers.added = reinterpret_cast<int32_t*>(w.buffers.delta + rows);
    w.buffers.begun = reinterpret_cast<uint32_t*>(w.buffers.added + counters);
  }
  if ((sums + 2 * rows + counters + 1) * 4 > bytes) {
    std::printf("workspace too small\n");
    std::exit(1);
  }
  return w;
}

struct Case {
  int B, H, H_kv, S_q, S_kv, D, D_v;
  int mask;    // 0 full, 1 causal top left, 2 bottom right, 3 window
  int poison;  // 0 none, 1 K and V rows NaN, 2 V has Inf, 3 Q has NaN or Inf, 4 dO has
  double scale;
};

template <typename Element>
bool check(const Variant& variant, const Case& c, uint32_t seed, bool verbose) {
  const int pad = 8 * (seed % 3);
  Tensor<Element> q(c.B, c.H, c.S_q, c.D, pad, 5 * seed + 1),
      k(c.B, c.H_kv, c.S_kv, c.D, pad, 5 * seed + 2),
      v(c.B, c.H_kv, c.S_kv, c.D_v, pad, 5 * seed + 3),
      dout(c.B, c.H, c.S_q, c.D_v, pad, 5 * seed + 4), out(c.B, c.H, c.S_q, c.D_v, pad, 0),
      dq(c.B, c.H, c.S_q, c.D, pad, 0), dk(c.B, c.H_kv, c.S_kv, c.D, pad, 0),
      dv(c.B, c.H_kv, c.S_kv, c.D_v, pad, 0);
  std::mt19937 rng(seed);
  if (c.poison == 1) k.poison(rng, true, NAN), v.poison(rng, true, NAN);
  if (c.poison == 2) v.poison(rng, false, INFINITY);
  if (c.poison == 3) q.poison(rng, false, rng() % 2 ? NAN : INFINITY);
  if (c.poison == 4) dout.poison(rng, false, rng() % 2 ? NAN : INFINITY);
  const int64_t rows = int64_t{c.B} * c.H * c.S_q, kv_rows = int64_t{c.B} * c.H_kv * c.S_kv;
  float *lse, *dlse, *want_dq, *want_dk, *want_dv, *memory;
  CHECK(cudaMalloc(&lse, rows * 4));
  CHECK(cudaMalloc(&dlse, rows * 4));
  CHECK(cudaMalloc(&want_dq, rows * c.D * 4));
  CHECK(cudaMalloc(&want_dk, kv_rows * c.D * 4));
  CHECK(cudaMalloc(&want_dv, kv_rows * c.D_v * 4));
  const size_t bytes = size_t{256} << 20;
  CHECK(cudaMalloc(&memory, bytes));
  CHECK(cudaMemset(memory, 0xff, bytes));
  fill_kernel<<<64, 256>>>(dlse, rows, seed * 7, 1.0f);
  BackwardArgs a;
  a.dtype = std::is_same_v<Element, __half> ? DType::f16 : DType::bf16;
  a.shape = {c.B, c.H, c.H_kv, c.S_q, c.S_kv, c.D, c.D_v};
  a.q = q.view, a.k = k.view, a.v = v.view, a.out = out.view, a.dout = dout.view;
  a.dq = dq.view, a.dk = dk.view, a.dv = dv.view;
  a.lse = lse;
  if (seed % 4 == 0) a.dlse = dlse;
  a.mask = mask_of(c.mask, c.S_q, c.S_kv, seed);
  a.scale = ScoreScale::from(c.scale, a.dtype);
  a.factor = c.scale;
  forward_reference<Element><<<rows, 128, c.S_kv * 4 + 16>>>(a, lse);
  dq_reference<Element><<<rows, 128, c.S_kv * 4 + 16>>>(a, want_dq);
  dkv_reference<Element><<<kv_rows, 128, c.S_q * 8 + 16>>>(a, want_dk, want_dv);
  CHECK(cudaDeviceSynchronize());
  const auto kernel = a.dtype == DType::f16 ? variant.f16 : variant.bf16;
  const double limit = a.dtype == DType::f16 ? 1.5e-3 : 1.0e-2;
  bool all_good = true;
  for (const bool ordered : {true, false}) {
    std::vector<uint16_t> first_dq, first_dk, first_dv;
    bool same = true;
    for (int repeat = 0; repeat < 3; ++repeat) {
      CHECK(cudaMemset(memory, 0xff, bytes));
      Workspace w = workspace_for(a, variant.config, memory, bytes, {ordered, 0});
      // Whichever heads are interleaved.
      w.plan.section_heads = repeat == 0 ? w.plan.section_heads : repeat == 1 ? 1 : w.plan.heads;
      for (const Tensor<Element>* t : {&dq, &dk, &dv})
        CHECK(cudaMemset(t->view.data, 0xff, t->size() * 2));
      RUN(prepare_wide_rows(a, w.plan, variant.config, w.buffers, nullptr));
      RUN(kernel(a, w.plan, w.buffers, nullptr));
      RUN(finish_wide_dq(a, w.plan, variant.config, w.buffers, nullptr));
      CHECK(cudaDeviceSynchronize());
      if (repeat == 0) {
        first_dq = dq.get(), first_dk = dk.get(), first_dv = dv.get();
      } else {
        same &= first_dk == dk.get() && first_dv == dv.get();
        if (ordered) same &= first_dq == dq.get();
      }
    }
    bool good = same;
    const std::string texts = "dq " + dq.compare(want_dq, limit, good) + "; dk " +
                              dk.compare(want_dk, limit, good) + "; dv " +
                              dv.compare(want_dv, limit, good);
    if (!good || verbose) {
      std::printf(
          "%s (%s) %s %s seed %u B%d H%d/%d S%d/%d D%d/%d mask%d poison%d scale%g same%d: %s\n",
          good ? "ok  " : "FAIL", variant.name, ordered ? "ordered" : "any order",
          a.dtype == DType::f16 ? "f16" : "bf16", seed, c.B, c.H, c.H_kv, c.S_q, c.S_kv, c.D, c.D_v,
          c.mask, c.poison, c.scale, same, texts.c_str());
      std::fflush(stdout);
    }
    all_good &= good;
  }
  for (float* p : {lse, dlse, want_dq, want_dk, want_dv, memory}) CHECK(cudaFree(p));
  return all_good;
}

int check_all(int cases, const char* only) {
  int failed = 0, done = 0;
  for (const Variant& variant : kVariants) {
    if (only != nullptr && std::strstr(variant.name, only) == nullptr) continue;
    std::mt19937 rng(1);
    auto pick = [&](std::initializer_list<int> list) { return list.begin()[rng() % list.size()]; };
    int failed_here = 0;
    for (int i = 0; i < cases && failed_here < 6; ++i) {
      Case c;
      c.B = pick({1, 2, 3});
      c.H_kv = pick({1, 2, 3});
      c.H = c.H_kv * pick({1, 1, 2, 4});
      c.S_q = i == 0   ? 64
              : i == 1 ? 256
                       : pick({1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 384, 512, 799});
      c.S_kv = i < 2        ? 128
               : i % 3 == 0 ? c.S_q
                            : pick({1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 384, 799});
      const int D = variant.config.head_dim;
      c.D = i % 4 == 3 ? D - 8 * pick({1, 2, 3}) : D;
      c.D_v = variant.config.value_dim;
      if (i % 4 == 3) c.D_v -= 8 * pick({1, 2, 3});
      c.mask = i < 2 ? 0 : pick({0, 1, 2, 2, 3});
      if (!variant.config.masked) c.mask = 0;
      c.poison = i < 2 ? 0 : pick({0, 0, 0, 1, 2, 3, 4});
      c.scale = (i % 7 == 5 ? -1.0 : i % 7 == 6 ? 3.0 : 1.0) / std::sqrt(c.D);
      failed_here += !check<__nv_bfloat16>(variant, c, 1000 + i, i < 1);
      ++done;
      if (variant.f16 != nullptr && i % 3 == 1) {
        failed_here += !check<__half>(variant, c, 2000 + i, false);
        ++done;
      }
    }
    failed += failed_here;
    std::printf("(%s): %d failed\n", variant.name, failed_here);
  }
  std::printf("checked %d, failed %d\n", done, failed);
  return failed != 0;
}

// Median times of the three kernels, in microseconds.
void time_us(const Variant& variant, const BackwardArgs& a, const Workspace& w, void* flush,
             size_t flush_bytes, int repeats, float (&median)[4]) {
  cudaEvent_t events[4];
  for (auto& event : events) CHECK(cudaEventCreate(&event));
  std::vector<float> times[4];
  for (int i = 0; i < repeats + 2; ++i) {
    CHECK(cudaMemsetAsync(flush, i, flush_bytes));
    CHECK(cudaEventRecord(events[0]));
    RUN(prepare_wide_rows(a, w.plan, variant.config, w.buffers, nullptr));
    CHECK(cudaEventRecord(events[1]));
    RUN(variant.bf16(a, w.plan, w.buffers, nullptr));
    CHECK(cudaEventRecord(events[2]));
    RUN(finish_wide_dq(a, w.plan, variant.config, w.buffers, nullptr));
    CHECK(cudaEventRecord(events[3]));
    CHECK(cudaEventSynchronize(events[3]));
    for (int part = 0; part < 4 && i >= 2; ++part) {
      float ms;
      CHECK(cudaEventElapsedTime(&ms, events[part == 3 ? 0 : part],
                                 events[part == 3 ? 3 : part + 1]));
      times[part].push_back(ms * 1000);
    }
  }
  for (int part = 0; part < 4; ++part) {
    std::sort(times[part].begin(), times[part].end());
    median[part] = times[part][times[part].size() / 2];
  }
  for (auto& event : events) CHECK(cudaEventDestroy(event));
}

int bench(const char* only, int shortest, int longest) {
  const size_t flush_bytes = size_t{160} << 20;
  void* flush;
  CHECK(cudaMalloc(&flush, flush_bytes));
  const int64_t elements = int64_t{16384} * 3072;
  __nv_bfloat16* tensors[8];
  for (int i = 0; i < 8; ++i) {
    CHECK(cudaMalloc(&tensors[i], elements * 2));
    fill_kernel<<<1024, 256>>>(tensors[i], elements, 7 + i, i == 3 ? 0.1f : 1.0f);
  }
  float *lse, *memory;
  CHECK(cudaMalloc(&lse, int64_t{16384} * 32 * 4));
  const size_t bytes = size_t{400} << 20;
  CHECK(cudaMalloc(&memory, bytes));
  const auto number = [](const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::atoi(text);
  };
  const int group = number("LAB_GROUP", 1), tokens = number("LAB_TOKENS", 16384);
  // LAB_HEADS: how many heads to interleave, besides what a call does.
  std::vector<Order> orders = {{false, 0}, {true, 0}};
  if (const char* heads = std::getenv("LAB_HEADS"); heads != nullptr) {
    std::istringstream all(heads);
    for (int n; all >> n;) orders.push_back({true, n});
  }
  std::printf("TFLOP/s of all three kernels, of the main one; us of the three\n");
  for (int causal = 0; causal < 2; ++causal) {
    for (int S = shortest; S <= longest; S *= 2) {
      for (const Variant& variant : kVariants) {
        if (only != nullptr && std::strstr(variant.name, only) == nullptr) continue;
        if (variant.causal != 2 && variant.causal != causal) continue;
        const int D = variant.config.head_dim;
        const int DV = variant.config.value_dim;
        const int64_t B = std::max(tokens / S, 1), H = D == 256 ? 8 : 16, H_kv = H / group;
        BackwardArgs a;
        a.dtype = DType::bf16;
        a.shape = {B, H, H_kv, S, S, D, DV};
        View* views[8] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
        for (int i = 0; i < 8; ++i) {
          const bool of_values = i == 2 || i == 3 || i == 4 || i == 7;
          const bool of_keys = i == 1 || i == 2 || i > 5;
          const int64_t d = of_values ? DV : D, h = of_keys ? H_kv : H;
          *views[i] = {tensors[i], S * h * d, d, h * d};
        }
        fill_constant<<<256, 256>>>(lse, int64_t{16384} * 32, std::log(float(S)) + 0.5f);
        a.lse = lse;
        a.mask = causal ? Mask::causal(S, S, Alignment::bottom_right) : Mask::full(S);
        a.scale = ScoreScale::from(1 / std::sqrt(double(D)), a.dtype);
        a.factor = 1 / std::sqrt(double(D));
        for (const Order& order : orders) {
          const Workspace w = workspace_for(a, variant.config, memory, bytes, order);
          float us[4];
          time_us(variant, a, w, flush, flush_bytes, S >= 8192 ? 5 : 9, us);
          uint64_t clock[4];
          CHECK(cudaMemcpyFromSymbol(clock, measured, sizeof clock));
          const double flop = 2e-6 * B * H * double(S) * S * (3 * D + 2 * DV) / (causal ? 2 : 1);
          std::printf(
              "%-6s S %5d (%-20s) %s %3u heads %5.0f %5.0f   %6.0f %6.0f %6.0f   %.0f MHz\n",
              causal ? "causal" : "full", S, variant.name,
              order.ordered ? "ordered  " : "any order", w.plan.section_heads, flop / us[3],
              flop / us[1], us[0], us[1], us[2],
              1e3 * (clock[2] - clock[0]) / (clock[3] - clock[1]));
        }
      }
      std::fflush(stdout);
    }
  }
  return 0;
}

#include "soak.cuh"

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  const char* only = argc > 3 && std::strcmp(argv[3], "all") != 0 ? argv[3] : nullptr;
  if (mode == "check") return check_all(argc > 2 ? std::atoi(argv[2]) : 40, only);
  if (mode == "soak") return soak(argc > 2 ? std::atoi(argv[2]) : 20);
  if (mode == "bench" && argc > 2) only = std::strcmp(argv[2], "all") != 0 ? argv[2] : nullptr;
  return bench(only, argc > 3 ? std::atoi(argv[3]) : 512, argc > 4 ? std::atoi(argv[4]) : 16384);
}
