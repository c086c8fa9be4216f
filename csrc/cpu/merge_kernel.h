// SPDX-License-Identifier: BSD-3-Clause
// What a merge does along one row of out, once for each instruction set: merge_*.cpp instantiate it
// with their flags. Weights are computed in merge.cpp, without special flags.
#pragma once

#include <cstring>

#include "core/problem.h"
#include "cpu/simd.h"

namespace online_attention::cpu {

template <class Element>
struct WeightedRow {
  const Element* data;
  RealOf<Element> weight;
};

template <class Element>
struct MergeKernel {
  using Real = RealOf<Element>;
  // to := the sum over the rows of weight * row, in their order. No row: 0.
  void (*weighted_sum)(const WeightedRow<Element>* rows, int64_t count, int64_t D_v, Element* to);
  // The sum of a * b.
  Real (*dot)(const Element* a, const Element* b, int64_t D_v);
};

namespace baseline {
template <class Element>
MergeKernel<Element> merge_kernel();
}
#if defined(__x86_64__)
namespace avx2 {
template <class Element>
MergeKernel<Element> merge_kernel();
}
#endif

template <class Isa, class Element>
struct MergeLoops {
  using Real = RealOf<Element>;
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int kLanes = Lanes::kLanes;
  static constexpr int kVecs = 4;  // independent sums, to hide the latency of an addition

  // The first `count` < kLanes lanes, zeros behind them. Touches no other memory.
  static Vec load_first(const Element* from, int64_t count) {
    Element padded[kLanes] = {};
    std::memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(Element));
    return Lanes::load(padded);
  }

  static void weighted_sum(const WeightedRow<Element>* rows, int64_t count, int64_t D_v,
                           Element* to) {
    int64_t d = 0;
    for (; d + kVecs * kLanes <= D_v; d += kVecs * kLanes) {
      Vec sums[kVecs] = {};
      for (int64_t r = 0; r < count; ++r) {
        for (int i = 0; i < kVecs; ++i) {
          sums[i] += rows[r].weight * Lanes::load(rows[r].data + d + i * kLanes);
        }
      }
      for (int i = 0; i < kVecs; ++i) Lanes::store(sums[i], to + d + i * kLanes);
    }
    for (; d + kLanes <= D_v; d += kLanes) {
      Vec sum = {};
      for (int64_t r = 0; r < count; ++r) sum += rows[r].weight * Lanes::load(rows[r].data + d);
      Lanes::store(sum, to + d);
    }
    if (d == D_v) return;
    Vec sum = {};
    for (int64_t r = 0; r < count; ++r) {
      sum += rows[r].weight * load_first(rows[r].data + d, D_v - d);
    }
    Lanes::store_first(sum, to + d, D_v - d);
  }

  static Real dot(const Element* a, const Element* b, int64_t D_v) {
    Vec sums[kVecs] = {};
    int64_t d = 0;
    for (; d + kVecs * kLanes <= D_v; d += kVecs * kLanes) {
      for (int i = 0; i < kVecs; ++i) {
        sums[i] += Lanes::load(a + d + i * kLanes) * Lanes::load(b + d + i * kLanes);
      }
    }
    for (; d + kLanes <= D_v; d += kLanes) sums[0] += Lanes::load(a + d) * Lanes::load(b + d);
    if (d < D_v) sums[1] += load_first(a + d, D_v - d) * load_first(b + d, D_v - d);
    return Lanes::sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  static MergeKernel<Element> kernel() { return {weighted_sum, dot}; }
};

}  // namespace online_attention::cpu
