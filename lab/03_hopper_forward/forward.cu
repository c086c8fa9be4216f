// SPDX-License-Identifier: BSD-3-Clause
// Correctness and speed of configurations of the Hopper forward kernel, by themselves. Build:
//   nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a -cudart static \
//     lab/03_hopper_forward/forward.cu csrc/cuda/combine.cu csrc/cuda/tile_plan.cpp \
//     csrc/cuda/hopper/forward_plan.cpp csrc/cuda/hopper/tensor_map.cu \
//     csrc/cuda/hopper/tile_counter.cu
// Run: ./a.out check [cases]; ./a.out bench
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../common.cuh"
#include "cuda/hopper/forward_launch.cuh"

using namespace online_attention;
using namespace online_attention::lab;
using namespace online_attention::cuda;
using namespace online_attention::cuda::hopper;

struct Variant {
  const char* name;
  ForwardConfig config;
  int causal;  // 1: for causal calls only, 0: for full ones, 2: both
  Status (*bf16)(const ForwardArgs&, int);
  Status (*f16)(const ForwardArgs&, int);
};

// Enough for every case: the workspace is what the plan says.
void* workspace() {
  static void* memory = nullptr;
  if (memory == nullptr) CHECK(cudaMalloc(&memory, size_t{256} << 20));
  return memory;
}

template <typename Element, int D, int DV, int N, int G, int S, int QS, bool T, int F>
__global__ void __launch_bounds__(128 * (G + 1), 1)
    lab_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr ForwardConfig config = {D, DV, N, G, S, QS, T, F};
  forward_block<Element, config>(call, smem);
}

template <typename Element, int D, int DV, int N, int G, int S, int QS, bool T, int F>
Status run(const ForwardArgs& args, int grid) {
  constexpr ForwardConfig config = {D, DV, N, G, S, QS, T, F};
  const ForwardPlan plan = plan_forward(args, config, 132);
  ForwardCall call;
  const Status status = describe_call(args, config, plan, call);
  if (status != kOk) return status;
  place_workspace(workspace(), plan, call);
  if (plan.counts) RUN(zeroed_counter(nullptr, workspace(), call.taken));
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(grid, call.plan.tiles()));
  const Status launched = launch(lab_kernel<Element, D, DV, N, G, S, QS, T, F>, blocks,
                                 config.threads(), config.smem_bytes(), nullptr, call);
  if (launched != kOk || call.plan.splits == 1) return launched;
  return combine(args, call.plan, call.partial, nullptr);
}

#define VARIANT(causal, D, DV, N, G, S, QS, T, F)               \
  {#D "/" #DV " n" #N " g" #G " s" #S " q" #QS " t" #T " f" #F, \
   {D, DV, N, G, S, QS, T, F},                                  \
   causal,                                                      \
   run<__nv_bfloat16, D, DV, N, G, S, QS, T, F>,                \
   F16(D, DV, N, G, S, QS, T, F)}
#ifdef WITH_F16
#define F16(...) run<__half, __VA_ARGS__>
#else
#define F16(...) nullptr
#endif

const Variant kVariants[] = {
#include VARIANTS
};

template <typename Element>
__global__ void reference_kernel(ForwardArgs a, float* out, float* lse) {
  attend_by_definition<Element>(a, lse, [&](int, int, int, int d, float value) {
    out[blockIdx.x * int64_t{a.shape.D_v} + d] = value;
  });
}

struct Case {
  int B, H, H_kv, S_q, S_kv, D, D_v,
      mask;    // mask: 0 full, 1 causal top left, 2 bottom right, 3 window
  int poison;  // 0 none, 1 K and V rows NaN, 2 V has Inf
  double scale;
  int grid;
};

template <typename Element>
bool check(const Variant& variant, const Case& c, uint32_t seed, bool verbose) {
  const int pad = 24, D_pad = 8 * ((seed % 3) + 0);  // rows behind each tensor, columns behind rows
  const int Dk = c.D + D_pad, Dv = c.D_v + D_pad;
  const int64_t Sq = c.S_q + pad, Skv = c.S_kv + pad;
  auto alloc = [](int64_t bytes) {
    void* p;
    CHECK(cudaMalloc(&p, bytes + 256));
    CHECK(cudaMemset(p, 0xff, bytes + 256));
    return p;
  };  // NaN
  // (B, S, H, D) order, poisoned behind every length.
  auto make = [&](int64_t H, int64_t S, int64_t S_alloc, int64_t D, int64_t D_alloc, uint32_t s,
                  View& view) {
    std::vector<Element> host(c.B * S_alloc * H * D_alloc);
    Element* dense;
    CHECK(cudaMalloc(&dense, c.B * H * S * D * 2 + 16));
    fill_kernel<<<256, 256>>>(dense, c.B * H * S * D, s, 1.0f);
    std::vector<Element> values(c.B * H * S * D);
    CHECK(cudaMemcpy(values.data(), dense, values.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaFree(dense));
    std::memset(host.data(), 0xff, host.size() * 2);
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t t = 0; t < S; ++t)
        for (int64_t h = 0; h < H; ++h)
          std::memcpy(&host[((b * S_alloc + t) * H + h) * D_alloc],
                      &values[((b * S + t) * H + h) * D], D * 2);
    void* device = alloc(host.size() * 2);
    CHECK(cudaMemcpy(device, host.data(), host.size() * 2, cudaMemcpyHostToDevice));
    view = {device, S_alloc * H * D_alloc, D_alloc, H * D_alloc};
  };
  ForwardArgs a;
  a.dtype = std::is_same_v<Element, __half> ? DType::f16 : DType::bf16;
  a.shape = {c.B, c.H, c.H_kv, c.S_q, c.S_kv, c.D, c.D_v};
  make(c.H, c.S_q, Sq, c.D, Dk, 3 * seed, a.q);
  make(c.H_kv, c.S_kv, Skv, c.D, Dk, 3 * seed + 1, a.k);
  make(c.H_kv, c.S_kv, Skv, c.D_v, Dv, 3 * seed + 2, a.v);
  const int64_t out_size = c.B * Sq * c.H * Dv, rows = int64_t{c.B} * c.H * c.S_q;
  a.out = {alloc(out_size * 2), Sq * c.H * Dv, Dv, c.H * Dv};
  a.lse = alloc(rows * 4 + 64);
  a.mask = mask_of(c.mask, c.S_q, c.S_kv, seed);
  a.scale = ScoreScale::from(c.scale, a.dtype);
  if (c.poison) {
    std::mt19937 rng(seed);
    for (int i = 0; i < 3; ++i) {
      const int j = rng() % c.S_kv, h = rng() % c.H_kv, b = rng() % c.B;
      std::vector<Element> row(std::max(c.D, c.D_v), Element(c.poison == 1 ? NAN : INFINITY));
      if (c.poison == 1)
        CHECK(cudaMemcpy(a.k.row<Element>(b, h, j), row.data(), c.D * 2, cudaMemcpyHostToDevice));
      const int columns = c.poison == 1 ? c.D_v : 1 + rng() % c.D_v;
      CHECK(cudaMemcpy(a.v.row<Element>(b, h, j), row.data(), columns * 2, cudaMemcpyHostToDevice));
    }
  }
  float *ref, *ref_lse;
  CHECK(cudaMalloc(&ref, rows * c.D_v * 4 + 16));
  CHECK(cudaMalloc(&ref_lse, rows * 4 + 16));
  CHECK(cudaFuncSetAttribute(reference_kernel<Element>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             200 * 1024));
  reference_kernel<Element><<<rows, 128, c.S_kv * 4 + 16>>>(a, ref, ref_lse);
  CHECK(cudaDeviceSynchronize());
  const auto kernel = a.dtype == DType::f16 ? variant.f16 : variant.bf16;
  std::vector<uint16_t> first, out(out_size);
  std::vector<float> lse(rows + 16), want(rows * c.D_v), want_lse(rows);
  bool same = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    CHECK(cudaMemset(a.out.data, 0xff, out_size * 2));
    CHECK(cudaMemset(a.lse, 0xff, rows * 4 + 64));
    RUN(kernel(a, repeat == 1 ? 132 : c.grid));
    if (repeat == 1)
      for (int again = 0; again < 3; ++again) kernel(a, 132);  // back to back
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(out.data(), a.out.data, out_size * 2, cudaMemcpyDeviceToHost));
    if (repeat == 0)
      first = out;
    else
      same &= first == out;
  }
  CHECK(cudaMemcpy(lse.data(), a.lse, rows * 4 + 64, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(want.data(), ref, want.size() * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(want_lse.data(), ref_lse, rows * 4, cudaMemcpyDeviceToHost));
  double error = 0, norm = 0, lse_error = 0, most = 0;
  int64_t wrong_class = 0, lse_class = 0, written_outside = 0, checked = 0, bad_row = -1;
  auto as_float = [](uint16_t bits) {
    Element e;
    std::memcpy(&e, &bits, 2);
    return float(e);
  };
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t t = 0; t < Sq; ++t)
      for (int64_t h = 0; h < c.H; ++h)
        for (int64_t d = 0; d < Dv; ++d) {
          const uint16_t bits = out[((b * Sq + t) * c.H + h) * Dv + d];
          if (t >= c.S_q || d >= c.D_v) {
            written_outside += bits != 0xffff;
            continue;
          }
          const int64_t row = (b * c.H + h) * c.S_q + t;
          const float x = as_float(bits), y = want[row * c.D_v + d];
          ++checked;
          if (std::isnan(y) != std::isnan(x) || std::isinf(x) != std::isinf(y)) {
            if (c.poison == 2 && !std::isfinite(x) && !std::isfinite(y)) continue;
            ++wrong_class;
            if (bad_row < 0) bad_row = row;
            continue;
          }
          if (!std::isfinite(y)) continue;
          error += (x - y) * (x - y);
          norm += double(y) * y;
          most = std::max<double>(most, std::fabs(x - y) - 0.02 * std::fabs(y));
          if (std::fabs(x - y) > 0.03 + 0.03 * std::fabs(y) && bad_row < 0) bad_row = row;
        }
  for (int64_t i = 0; i < rows; ++i) {
    if (std::isfinite(lse[i]) != std::isfinite(want_lse[i]) ||
        std::isnan(lse[i]) != std::isnan(want_lse[i])) {
      ++lse_class;
      continue;
    }
    if (std::isfinite(lse[i]))
      lse_error = std::max<double>(
          lse_error, std::fabs(lse[i] - want_lse[i]) / std::max(1.0f, std::fabs(want_lse[i])));
  }
  error = std::sqrt(error / std::max(norm, 1e-30));
  const double limit = a.dtype == DType::f16 ? 6e-4 : 4e-3;
  const bool good = same && error < limit && wrong_class == 0 && lse_class == 0 &&
                    lse_error < 1e-4 && written_outside == 0 && most < 0.03;
  if (!good || verbose) {
    std::printf(
        "%s %s %s B%d H%d/%d S%d/%d D%d/%d mask%d poison%d scale%g grid%d: error %.2e most %.2e "
        "lse %.2e class %ld/%ld outside %ld same %d row %ld\n",
        good ? "ok  " : "FAIL", variant.name, a.dtype == DType::f16 ? "f16" : "bf16", c.B, c.H,
        c.H_kv, c.S_q, c.S_kv, c.D, c.D_v, c.mask, c.poison, c.scale, c.grid, error, most,
        lse_error, long(wrong_class), long(lse_class), long(written_outside), same, long(bad_row));
    std::fflush(stdout);
  }
  for (void* p : {a.q.data, a.k.data, a.v.data, a.out.data, a.lse, static_cast<void*>(ref),
                  static_cast<void*>(ref_lse)})
    CHECK(cudaFree(p));
  return good;
}

int check_all(int cases) {
  int failed = 0, done = 0;
  std::mt19937 rng(1);
  auto pick = [&](std::initializer_list<int> list) { return list.begin()[rng() % list.size()]; };
  for (int i = 0; i < cases && failed < 12; ++i) {
    for (const Variant& variant : kVariants) {
      Case c;
      c.B = pick({1, 2, 3});
      c.H_kv = pick({1, 2, 3});
      c.H = c.H_kv * pick({1, 1, 2, 4});
      c.S_q = i == 0 ? 128
                     : pick({1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 384, 512, 799,
                             1024, 1111});
      c.S_kv = i == 0       ? 128
               : i % 3 == 0 ? c.S_q
                            : pick({1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257, 384, 512,
                                    799, 1024, 1111});
      const int D = variant.config.head_dim, D_v = variant.config.value_dim;
      c.D = i % 4 == 3 ? D - 8 * pick({1, 2, 3}) : D;
      c.D_v = i % 4 == 3 ? D_v - 8 * pick({1, 2, 3}) : D_v;
      c.mask = i == 0 ? 0 : pick({0, 1, 2, 2, 3});
      c.poison = i < 2 ? 0 : pick({0, 0, 1, 2});
      c.scale = (i % 7 == 5 ? -1.0 : i % 7 == 6 ? 3.0 : 1.0) / std::sqrt(c.D);
      c.grid = pick({1, 7, 131, 132});
      failed += !check<__nv_bfloat16>(variant, c, 1000 + i, i < 1);
      ++done;
      if (variant.f16 != nullptr && i % 3 == 1) {
        failed += !check<__half>(variant, c, 2000 + i, false);
        ++done;
      }
    }
  }
  std::printf("checked %d, failed %d\n", done, failed);
  return failed != 0;
}

// Median time of a call by itself, behind a flush of the L2 cache; LAB_ROW=1: of calls behind each
// other for 8 ms, which find their keys in the cache and the chip at its power limit.
double time_us(const Variant& variant, const ForwardArgs& a, void* flush, size_t flush_bytes,
               int repeats) {
  static const bool in_row = std::getenv("LAB_ROW") != nullptr;
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  const auto time = [&](int calls) {
    CHECK(cudaEventRecord(begin));
    for (int i = 0; i < calls; ++i) RUN(variant.bf16(a, 132));
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    return 1000.0 * ms / calls;
  };
  if (in_row) {
    const double once = time(2);
    const double us = time(std::max(2, static_cast<int>(8000 / once)));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return us;
  }
  std::vector<double> times;
  for (int i = 0; i < repeats + 3; ++i) {
    CHECK(cudaMemsetAsync(flush, i, flush_bytes));
    const double us = time(1);
    if (i >= 3) times.push_back(us);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int bench(const char* only) {
  const size_t flush_bytes = size_t{160} << 20;
  void* flush;
  CHECK(cudaMalloc(&flush, flush_bytes));
  const int64_t elements = int64_t{16384} * 2048;
  __nv_bfloat16* tensors[4];
  for (int i = 0; i < 4; ++i) {
    CHECK(cudaMalloc(&tensors[i], elements * 2));
    fill_kernel<<<1024, 256>>>(tensors[i], elements, 7 + i, 1.0f);
  }
  float* lse;
  CHECK(cudaMalloc(&lse, int64_t{16384} * 32 * 4));
  if (only != nullptr && std::strncmp(only, "one", 3) == 0) {  // one:variant:S:causal
    int v, S, causal;
    std::sscanf(only, "one:%d:%d:%d", &v, &S, &causal);
    const Variant& variant = kVariants[v];
    const int D = variant.config.head_dim;
    const int64_t B = 16384 / S, H = 2048 / D;
    ForwardArgs a;
    a.dtype = DType::bf16;
    a.shape = {B, H, H, S, S, D, D};
    for (auto [view, p] : {std::pair{&a.q, 0}, {&a.k, 1}, {&a.v, 2}, {&a.out, 3}})
      *view = {tensors[p], S * H * D, D, H * D};
    a.lse = lse;
    a.mask = causal ? Mask::causal(S, S, Alignment::bottom_right) : Mask::full(S);
    a.scale = ScoreScale::from(1 / std::sqrt(double(D)), a.dtype);
    for (int i = 0; i < 2; ++i) variant.bf16(a, 132);
    CHECK(cudaDeviceSynchronize());
    return 0;
  }
  const int lengths[] = {512, 1024, 2048, 4096, 8192, 16384};
  constexpr int kRounds = 5;
  constexpr int kCount = sizeof kVariants / sizeof kVariants[0];
  // TFLOP/s of variant, mask and length. Variants take turns, because the clock falls with time.
  std::vector<double> speeds[kCount][2][6];
  for (int l = 0; l < 6; ++l) {
    const int S = lengths[l];
    for (int causal = 0; causal < 2; ++causal) {
      for (int round = 0; round < kRounds; ++round) {
        for (int v = 0; v < kCount; ++v) {
          const Variant& variant = kVariants[v];
          if (only != nullptr && std::strstr(variant.name, only) == nullptr) continue;
          const int D = variant.config.head_dim;
          const int D_v = variant.config.value_dim;
          if (variant.causal != 2 && variant.causal != causal) continue;
          const int64_t B = 16384 / S, H = 2048 / D;
          ForwardArgs a;
          a.dtype = DType::bf16;
          a.shape = {B, H, H, S, S, D, D_v};
          for (auto [view, p] : {std::pair{&a.q, 0}, {&a.k, 1}, {&a.v, 2}, {&a.out, 3}})
            *view = p < 2 ? View{tensors[p], S * H * D, D, H * D}
                          : View{tensors[p], S * H * D_v, D_v, H * D_v};
          a.lse = lse;
          a.mask = causal ? Mask::causal(S, S, Alignment::bottom_right) : Mask::full(S);
          a.scale = ScoreScale::from(1 / std::sqrt(double(D)), a.dtype);
          const double us = time_us(variant, a, flush, flush_bytes, S >= 8192 ? 5 : 11);
          speeds[v][causal][l].push_back(2e-6 * B * H * double(S) * S * (D + D_v) /
                                         (causal ? 2 : 1) / us);
        }
      }
    }
  }
  std::printf("%-40s %-7s", "variant", "mask");
  for (int S : lengths) std::printf("%7d", S);
  std::printf("\n");
  for (int v = 0; v < kCount; ++v) {
    for (int causal = 0; causal < 2; ++causal) {
      if (speeds[v][causal][0].empty()) continue;
      std::printf("%-40s %-7s", kVariants[v].name, causal ? "causal" : "full");
      for (std::vector<double>& rounds : speeds[v][causal]) {
        std::sort(rounds.begin(), rounds.end());
        std::printf("%7.0f", rounds[kRounds / 2]);
      }
      std::printf("\n");
    }
  }
  return 0;
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "check") return check_all(argc > 2 ? std::atoi(argv[2]) : 60);
  return bench(argc > 2 ? argv[2] : nullptr);
}
