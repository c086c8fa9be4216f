// SPDX-License-Identifier: BSD-3-Clause
// What one core can do: multiply-adds that touch registers alone, the two products of the forward
// kernel by themselves, and its softmax. See README.md for how to build it.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <memory>
#include <new>
#include <vector>

#ifdef __AMX_BF16__
#include "cpu/isa_amx_bf16.h"
namespace set = online_attention::cpu::amx_bf16;
using Stored = online_attention::cpu::Bf16;
#elif defined(__AVX512BF16__)
#include "cpu/isa_avx512_bf16.h"
namespace set = online_attention::cpu::avx512_bf16;
using Stored = online_attention::cpu::Bf16;
#else
#include "cpu/isa_avx512.h"
namespace set = online_attention::cpu::avx512;
using Stored = float;
#endif
#include "cpu/forward_kernel.h"

namespace online_attention {
template struct SoftmaxRow<float>;
template float exp2_of<float>(float);
template float log2_of<float>(float);
template float max_of<float>(float, float);
}  // namespace online_attention

namespace {

using namespace online_attention::cpu;
using Isa = set::Isa;
using Operand = Isa::Operand<Stored>;
using Number = Operand::Number;
using Lanes = Operand::Lanes;
using Sums = Operand::Sums;
constexpr int kRows = Isa::kBlockRows, kVecs = Isa::kBlockVecs, kPanel = kVecs * Lanes::kLanes;
constexpr int kKeys = 128;
constexpr int kStride = kKeys * static_cast<int>(sizeof(float) / sizeof(Operand::Weight));

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

template <class Work>
double best_seconds(Work work) {
  double best = 1e9;
  for (const double start = cpu_seconds(); cpu_seconds() - start < 0.3;) {
    const double begin = cpu_seconds();
    for (int i = 0; i < 64; ++i) work();
    best = std::min(best, (cpu_seconds() - begin) / 64);
  }
  return best;
}

#ifdef __AMX_BF16__
void registers_alone() {
  constexpr int kSteps = 1000;
  using set::Tiles;
  const double seconds = best_seconds([&] {
    for (int step = 0; step < kSteps; ++step) {
      Tiles::multiply_add<0, 4, 6>();
      Tiles::multiply_add<1, 4, 7>();
      Tiles::multiply_add<2, 5, 6>();
      Tiles::multiply_add<3, 5, 7>();
    }
  });
  const double flops = 2.0 * 4 * kSteps * Tiles::kRows * Tiles::kRows * 2 * Tiles::kRows;
  std::printf("registers alone: %.1f GFLOP/s\n", flops / seconds / 1e9);
}
#else
void registers_alone() {
  constexpr int kSteps = 1000;
  Sums::Vec total = {};
  const double seconds = best_seconds([&] {
    Sums::Vec sum[24] = {};
    Lanes::Vec a = {}, b = {};
    asm volatile("" : "+v"(a), "+v"(b));
    for (auto& s : sum) asm volatile("" : "+v"(s));  // or they would be one and the same
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < 24; ++i) sum[i] = Operand::multiply_add(sum[i], a, b);
      asm volatile("" : "+v"(a), "+v"(b));
    }
    for (const auto& s : sum) total += s;
  });
  asm volatile("" : : "v"(total));
  const double flops = 2.0 * 24 * kSteps * Sums::kLanes * Operand::kDepth;
  std::printf("registers alone: %.1f GFLOP/s\n", flops / seconds / 1e9);
}
#endif

// A vector that begins with a line of the caches, as the kernels' working memory does.
template <class T>
struct OnLines : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = OnLines<U>;
  };
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, std::align_val_t{64}); }
};
template <class T>
using Lines = std::vector<T, OnLines<T>>;

void pieces(int64_t D) {
  const int64_t steps = steps_of<Operand>(D);
  const auto zeros = [](int64_t count) { return Lines<Number>(static_cast<std::size_t>(count)); };
  auto q = zeros(kRows * steps), k = zeros(kKeys * steps), v = zeros(kKeys * D);
  Lines<float> scores(kRows * kKeys), out(kRows * D), alpha(kRows, 1.0F);
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(i % 37) * 0.1F;
  constexpr int kPart = kPartOfScores<Isa, Stored>;
  Lines<float> products(scores.size());
  const double qk = best_seconds([&] {
    for (int key = 0; key < kKeys; key += kPanel) {
      multiply_queries_keys<Operand, kRows, kVecs, kPanel, kKeys, kPart>(
          products.data() + key, q.data(), k.data() + key * steps, steps, 1.0F);
    }
  });
  const auto* weights = reinterpret_cast<const Operand::Weight*>(products.data());
  const double pv = best_seconds([&] {
    add_values<Operand, kRows, kVecs, kStride, kStride>(out.data(), D, alpha.data(), weights,
                                                        v.data(), D, {0, kKeys / Operand::kDepth});
  });
  SoftmaxRows<Sums, float, kRows, kRows> softmax;
  float alphas[kWholeVectors<Sums, kRows>];
  const double weigh = best_seconds([&] {
    products = scores;
    weigh_rows<Isa, Operand, kRows, kKeys>(softmax, 0, products.data(), alphas, {0, kKeys}, 0.18F,
                                           [] {});
  });
  const double copy = best_seconds([&] { products = scores; });
  const double flops = 2.0 * kRows * kKeys * static_cast<double>(D);
  auto packed = zeros(kKeys * steps);
  const double pack = best_seconds([&] {
    const auto key = [&](int i) { return reinterpret_cast<const Stored*>(k.data()) + i * D; };
    for (int first = 0; first < kKeys; first += kPanel) {
      pack_transposed<Operand, kPanel>(packed.data() + first * steps, D, kPanel,
                                       [&](int i) { return key(first + i); });
    }
  });
  std::printf("D %3d: packing keys %.2f ns a key\n", static_cast<int>(D), pack * 1e9 / kKeys);
  std::printf("D %3d: q k^T %.1f, p v %.1f GFLOP/s; softmax %.2f ns for 16 scores\n",
              static_cast<int>(D), flops / qk / 1e9, flops / pv / 1e9,
              (weigh - copy) * 1e9 * 16 / (kRows * kKeys));
}

}  // namespace

int main() {
#ifdef __AMX_BF16__
  if (!set::tiles_granted()) return std::puts("no AMX here"), 1;
  set::Tiles::configure();
#endif
  registers_alone();
  pieces(64);
  pieces(128);
}
