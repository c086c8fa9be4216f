// SPDX-License-Identifier: BSD-3-Clause
// Correctness and speed of configurations of the Hopper backward kernel, by themselves. Build:
//   nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a -cudart static \
//     -DVARIANTS='"variants.inc"' lab/04_hopper_backward/backward.cu \
//     csrc/cuda/hopper/tensor_map.cu csrc/cuda/hopper/backward_rows.cu csrc/cuda/backward_plan.cpp
// Run: ./a.out check [cases]; ./a.out soak; ./a.out bench [part of a variant's name]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../backward.cuh"
#include "cuda/hopper/backward_launch.cuh"
#include "cuda/hopper/backward_rows.h"

using namespace online_attention;
using namespace online_attention::lab;
using namespace online_attention::cuda;
using namespace online_attention::cuda::hopper;

using Main = Status (*)(const BackwardArgs&, const BackwardPlan&, const BackwardBuffers&);
struct Variant {
  const char* name;
  BackwardConfig config;
  int causal;  // 1: for causal calls only, 0: for full ones, 2: both
  Main bf16, f16;
};

int grid_limit = 132;
bool any_order = false;  // even where the library would add in order
cudaStream_t stream = nullptr;
__device__ uint64_t measured[4];  // clocks and nanoseconds of a block, begin and end
__device__ uint64_t global_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

template <typename Element, int... kFields>
__global__ void __launch_bounds__(BackwardConfig::kThreads, 1)
    lab_kernel(const __grid_constant__ BackwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr BackwardConfig config = {kFields...};
  if (blockIdx.x == 0 && threadIdx.x == 127) measured[0] = clock64(), measured[1] = global_ns();
  backward_block<Element, config>(call, smem);
  if (blockIdx.x == 0 && threadIdx.x == 128) measured[2] = clock64(), measured[3] = global_ns();
}

template <typename Element, int... kFields>
Status run(const BackwardArgs& args, const BackwardPlan& plan, const BackwardBuffers& buffers) {
  constexpr BackwardConfig config = {kFields...};
  BackwardCall call;
  const Status status = describe_call(args, plan, config, buffers, call);
  if (status != kOk) return status;
  return launch(lab_kernel<Element, kFields...>, std::min<int64_t>(plan.blocks(), grid_limit),
                BackwardConfig::kThreads, config.smem_bytes(), stream, call);
}

#ifdef WITH_F16
#define F16(...) run<__half, __VA_ARGS__>
#else
#define F16(...) nullptr
#endif
#define VARIANT(causal, ...) \
  {#__VA_ARGS__, {__VA_ARGS__}, causal, run<__nv_bfloat16, __VA_ARGS__>, F16(__VA_ARGS__)}

const Variant kVariants[] = {
#include VARIANTS
};

struct Workspace {
  BackwardPlan plan;
  BackwardBuffers buffers;
};
Workspace workspace_for(const BackwardArgs& a, const BackwardConfig& config, void* memory,
                        size_t bytes) {
  Workspace w;
  w.plan = plan_blocks(a, config, 132);
  const size_t rows = w.plan.dq_tiles() * config.tile_m;
  const size_t sums = w.plan.dq_tiles() * config.dq_floats();
  const size_t counters = counter_place(w.plan.dq_tiles(), 0);
  w.buffers.dq_sums = static_cast<float*>(memory);
  w.buffers.lse2 = w.buffers.dq_sums + sums;
  w.buffers.delta = w.buffers.lse2 + rows;
  auto* added = reinterpret_cast<int32_t*>(w.buffers.delta + rows);
  const bool ordered = adds_in_order(a, w.plan) && !any_order;
  if (ordered) w.buffers.added = added;
  w.buffers.finished_by_last = ordered && is_finished_by_last(a, w.plan);
  w.buffers.taken = reinterpret_cast<uint32_t*>(added + counters);
  if ((sums + 2 * rows + counters + 1) * 4 > bytes) {
    std::printf("workspace too small\n");
    std::exit(1);
  }
  return w;
}
#define RUN_ALL(a, w, variant, kernel)                                   \
  RUN(prepare_rows(a, (w).plan, (variant).config, (w).buffers, stream)); \
  RUN((kernel)(a, (w).plan, (w).buffers));                               \
  if (!(w).buffers.finished_by_last)                                     \
  RUN(finish_dq(a, (w).plan, (variant).config, (w).buffers, stream))

struct Case {
  int B, H, H_kv, S_q, S_kv, D, D_v;
  int mask;  // 0 full, 1 causal top left, 2 bottom right, 3 window
  bool deterministic;
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
  const size_t bytes = size_t{64} << 20;
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
  a.deterministic = c.deterministic;
  forward_reference<Element><<<rows, 128, c.S_kv * 4 + 16>>>(a, lse);
  dq_reference<Element><<<rows, 128, c.S_kv * 4 + 16>>>(a, want_dq);
  dkv_reference<Element><<<kv_rows, 128, c.S_q * 8 + 16>>>(a, want_dk, want_dv);
  CHECK(cudaDeviceSynchronize());
  const Workspace w = workspace_for(a, variant.config, memory, bytes);
  const auto kernel = a.dtype == DType::f16 ? variant.f16 : variant.bf16;
  std::vector<uint16_t> first_dq, first_dk, first_dv;
  bool same = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (const Tensor<Element>* t : {&dq, &dk, &dv})
      CHECK(cudaMemset(t->view.data, 0xff, t->size() * 2));
    CHECK(cudaMemset(memory, 0xff, bytes));
    if (repeat > 0) grid_limit = repeat == 1 ? 132 : 5;
    RUN_ALL(a, w, variant, kernel);
    CHECK(cudaDeviceSynchronize());
    if (repeat == 0) {
      first_dq = dq.get(), first_dk = dk.get(), first_dv = dv.get();
    } else {
      same &= first_dk == dk.get() && first_dv == dv.get();
      if (c.deterministic) same &= first_dq == dq.get();
    }
  }
  const double limit = a.dtype == DType::f16 ? 1.5e-3 : 1.0e-2;
  bool good = same;
  const std::string texts = "dq " + dq.compare(want_dq, limit, good) + "; dk " +
                            dk.compare(want_dk, limit, good) + "; dv " +
                            dv.compare(want_dv, limit, good);
  if (!good || verbose) {
    std::printf(
        "%s (%s) %s seed %u B%d H%d/%d S%d/%d D%d/%d mask%d det%d poison%d scale%g same%d: %s\n",
        good ? "ok  " : "FAIL", variant.name, a.dtype == DType::f16 ? "f16" : "bf16", seed, c.B,
        c.H, c.H_kv, c.S_q, c.S_kv, c.D, c.D_v, c.mask, c.deterministic, c.poison, c.scale, same,
        texts.c_str());
    std::fflush(stdout);
  }
  for (float* p : {lse, dlse, want_dq, want_dk, want_dv, memory}) CHECK(cudaFree(p));
  return good;
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
      c.D_v = i % 4 == 3 ? D - 8 * pick({1, 2, 3}) : D;
      c.mask = i < 2 ? 0 : pick({0, 1, 2, 2, 3});
      if (!variant.config.masked) c.mask = 0;
      c.poison = i < 2 ? 0 : pick({0, 0, 0, 1, 2, 3, 4});
      c.deterministic = i % 2 == 1;
      any_order = i % 4 == 0;
      c.scale = (i % 7 == 5 ? -1.0 : i % 7 == 6 ? 3.0 : 1.0) / std::sqrt(c.D);
      grid_limit = pick({1, 7, 131, 1 << 30});
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

struct Problem {
  __nv_bfloat16* tensors[8];
  float *lse, *memory;
  size_t bytes = size_t{400} << 20;
  static constexpr int64_t kElements = int64_t{16384} * 2048;
  Problem() {
    for (int i = 0; i < 8; ++i) {
      CHECK(cudaMalloc(&tensors[i], kElements * 2));
      fill_kernel<<<1024, 256>>>(tensors[i], kElements, 7 + i, i == 3 ? 0.1f : 1.0f);
    }
    CHECK(cudaMalloc(&lse, int64_t{16384} * 32 * 4));
    CHECK(cudaMalloc(&memory, bytes));
  }
  BackwardArgs args(int64_t B, int64_t H, int64_t H_kv, int64_t S, int64_t D, bool causal,
                    bool deterministic) {
    BackwardArgs a;
    a.dtype = DType::bf16;
    a.shape = {B, H, H_kv, S, S, D, D};
    View* views[8] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
    for (int i = 0; i < 8; ++i) {
      const int64_t heads = i == 1 || i == 2 || i >= 6 ? H_kv : H;
      *views[i] = {tensors[i], S * heads * D, D, heads * D};
    }
    fill_constant<<<256, 256>>>(lse, int64_t{16384} * 32, std::log(float(S)) + 0.5f);
    a.lse = lse;
    a.mask = causal ? Mask::causal(S, S, Alignment::bottom_right) : Mask::full(S);
    a.scale = ScoreScale::from(1 / std::sqrt(double(D)), a.dtype);
    a.factor = 1 / std::sqrt(double(D));
    a.deterministic = deterministic;
    return a;
  }
};

// Deterministic calls again and again on two streams: the same bits? Ordinary ones: how far apart?
int soak() {
  Problem first, second;
  cudaStream_t streams[2];
  for (auto& s : streams) CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  int failed = 0;
  for (const Variant& variant : kVariants) {
    for (int causal = 0; causal < 2; ++causal) {
      if (variant.causal != 2 && variant.causal != causal) continue;
      for (int det = 0; det < 2; ++det) {
        const int D = variant.config.head_dim, S = 2048 + 96;
        const int64_t H = 8, H_kv = 4, B = 2;
        any_order = det == 0;
        std::vector<uint16_t> want, got(B * S * H * D);
        double most = 0, norm = 0;
        int different = 0;
        for (int run = 0; run < 100; ++run) {
          grid_limit = run % 4 == 3 ? 37 : 132;
          const int running = run % 2 ? 2 : 1;
          BackwardArgs args[2];
          for (int of = 0; of < running; ++of) {
            args[of] = (of ? second : first).args(B, H, H_kv, S, D, causal, det);
            CHECK(cudaMemsetAsync(args[of].dq.data, 0xff, got.size() * 2));
          }
          CHECK(cudaDeviceSynchronize());
          for (int of = 0; of < running; ++of) {
            Problem& problem = of ? second : first;
            const Workspace w =
                workspace_for(args[of], variant.config, problem.memory, problem.bytes);
            stream = streams[of];
            RUN_ALL(args[of], w, variant, variant.bf16);
          }
          stream = nullptr;
          CHECK(cudaDeviceSynchronize());
          CHECK(cudaMemcpy(got.data(), first.tensors[5], got.size() * 2, cudaMemcpyDeviceToHost));
          if (run == 0) want = got;
          if (run > 0 && want == got) continue;
          different += run > 0;
          norm = 0;
          for (size_t i = 0; i < got.size(); ++i) {
            __nv_bfloat16 x, y;
            std::memcpy(&x, &want[i], 2), std::memcpy(&y, &got[i], 2);
            most = std::max<double>(most, std::fabs(float(x) - float(y)));
            norm += double(float(x)) * float(x);
          }
          norm = std::sqrt(norm / got.size());
        }
        failed += det && different > 0;
        std::printf("%s (%s) %s %s: %d of 99 differ, at most %.2e, rms of dq %.2e\n",
                    det && different ? "FAIL" : "ok  ", variant.name, causal ? "causal" : "full",
                    det ? "deterministic" : "ordinary", different, most, norm);
        std::fflush(stdout);
      }
    }
  }
  return failed;
}

// Median times of the two kernels and of both, in microseconds.
void time_us(const Variant& variant, const BackwardArgs& a, const Workspace& w, void* flush,
             size_t flush_bytes, int repeats, float (&median)[2]) {
  cudaEvent_t events[2];
  for (auto& event : events) CHECK(cudaEventCreate(&event));
  std::vector<float> times[2];
  for (int i = 0; i < 2 * repeats + 2; ++i) {
    const int part = i % 2;  // all, prepare_rows
    CHECK(cudaMemsetAsync(flush, i, flush_bytes));
    CHECK(cudaEventRecord(events[0]));
    if (part == 0) {
      RUN_ALL(a, w, variant, variant.bf16);
    } else {
      RUN(prepare_rows(a, w.plan, variant.config, w.buffers, stream));
    }
    CHECK(cudaEventRecord(events[1]));
    CHECK(cudaEventSynchronize(events[1]));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, events[0], events[1]));
    if (i >= 2) times[part].push_back(ms * 1000);
  }
  for (int part = 0; part < 2; ++part) {
    std::sort(times[part].begin(), times[part].end());
    median[part] = times[part][times[part].size() / 2];
  }
  for (auto& event : events) CHECK(cudaEventDestroy(event));
}

const char* kWays[] = {"any", "", "det"};

int bench(const char* only, int shortest, int longest) {
  const size_t flush_bytes = size_t{160} << 20;
  void* flush;
  CHECK(cudaMalloc(&flush, flush_bytes));
  Problem problem;
  const char* grid = std::getenv("LAB_GRID");
  const char* of_group = std::getenv("LAB_GROUP");
  const int64_t group = of_group == nullptr ? 1 : std::atoi(of_group);
  const char* ways = std::getenv("LAB_WAYS");
  std::printf("TFLOP/s of all kernels, of all but prepare_rows; us of prepare_rows, of all\n");
  for (int causal = 0; causal < 2; ++causal) {
    for (int S = shortest; S <= longest; S *= 2) {
      for (const Variant& variant : kVariants) {
        if (only != nullptr && std::strstr(variant.name, only) == nullptr) continue;
        if (variant.causal != 2 && variant.causal != causal) continue;
        const int D = variant.config.head_dim;
        const int64_t B = 16384 / S, H_kv = 2048 / D / group, H = H_kv * group;
        // In any order, as the library would, deterministic.
        for (int way = 0; way < (ways == nullptr ? 3 : std::atoi(ways)); ++way) {
          any_order = way == 0;
          const BackwardArgs a = problem.args(B, H, H_kv, S, D, causal, way == 2);
          const Workspace w = workspace_for(a, variant.config, problem.memory, problem.bytes);
          grid_limit = grid != nullptr ? std::atoi(grid) : blocks_of(w.plan, 132);
          float us[2];
          time_us(variant, a, w, flush, flush_bytes, S >= 8192 ? 5 : 9, us);
          uint64_t clock[4];
          CHECK(cudaMemcpyFromSymbol(clock, measured, sizeof clock));
          const double flop = 10e-6 * B * H * double(S) * S * D / (causal ? 2 : 1);
          std::printf("%-6s S %5d (%-20s) %-6s %5.0f %5.0f   %6.0f %6.0f   %.0f MHz\n",
                      causal ? "causal" : "full", S, variant.name, kWays[way], flop / us[0],
                      flop / (us[0] - us[1]), us[1], us[0],
                      1e3 * (clock[2] - clock[0]) / (clock[3] - clock[1]));
        }
      }
      std::fflush(stdout);
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  const char* only = argc > 3 && std::strcmp(argv[3], "all") != 0 ? argv[3] : nullptr;
  if (mode == "check") return check_all(argc > 2 ? std::atoi(argv[2]) : 40, only);
  if (mode == "bench" && argc > 2) only = std::strcmp(argv[2], "all") != 0 ? argv[2] : nullptr;
  if (mode == "soak") return soak();
  return bench(only, argc > 3 ? std::atoi(argv[3]) : 512, argc > 4 ? std::atoi(argv[4]) : 16384);
}
