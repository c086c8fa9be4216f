// SPDX-License-Identifier: BSD-3-Clause
// One vector register, through the compilers' portable vector types. `Isa` is a type of the file
// that is being compiled; it makes every instantiation distinct from those of the other files.
#pragma once

#include <cstddef>
#include <utility>

#include "cpu/element.h"

namespace online_attention::cpu {

template <class Real>
struct IntegerLike {
  using type = int32_t;
};
template <>
struct IntegerLike<double> {
  using type = int64_t;
};

template <class Number, int kBytes>
struct VectorOf {
  typedef Number type __attribute__((vector_size(kBytes)));
};

template <class Isa, class Real>
struct Simd {
  using Integer = typename IntegerLike<Real>::type;
  static constexpr int kLanes = Isa::kVectorBytes / static_cast<int>(sizeof(Real));
  using Vec = typename VectorOf<Real, Isa::kVectorBytes>::type;
  using Bits = typename VectorOf<Integer, Isa::kVectorBytes>::type;
  using Words = typename VectorOf<uint32_t, Isa::kVectorBytes>::type;
  using Halves = typename VectorOf<uint16_t, Isa::kVectorBytes / 2>::type;
  using Lanes = std::make_integer_sequence<int, kLanes>;

  static Vec splat(Real x) { return x - Vec{}; }
  static Bits splat_bits(Integer x) { return x - Bits{}; }

  template <int... kLane>
  static Bits iota(std::integer_sequence<int, kLane...>) {
    return Bits{kLane...};
  }
  static Bits iota() { return iota(Lanes{}); }

  // Whether one instruction looks up every lane of a table of one vector, by the low bits of its
  // index.
  static constexpr bool kLooksUp =
      sizeof(Real) == sizeof(float) && requires(Bits bits) { Isa::look_up(bits, bits); };
  static Bits look_up(Bits table, Bits index) { return (Bits)Isa::look_up(table, index); }

  // The larger of two; where one is NaN, `other`.
  static Vec max(Vec a, Vec other) { return a > other ? a : other; }

  static Vec load_bits(const void* from) {
    Vec v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  static Vec load(const Real* from) { return load_bits(from); }
  static Vec load(const F16* from) { return Isa::load(from); }
  static Vec load(const Bf16* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return (Vec)(__builtin_convertvector(halves, Words) << 16);
  }

  static void store(Vec v, Real* to) { __builtin_memcpy(to, &v, sizeof v); }
  static void store(Vec v, F16* to) { Isa::store(v, to); }
  // To the nearest, ties to even: half of the last kept bit less one, plus that bit, carries.
  static void store(Vec v, Bf16* to) {
    const Words bits = (Words)v;
    const Words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words quiet_nan = bits >> 16 | 0x40;
    const Words words = (bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : nearest;
    const Halves halves = __builtin_convertvector(words, Halves);
    __builtin_memcpy(to, &halves, sizeof halves);
  }

  // The first `count` < kLanes lanes. Touches no other memory.
  template <class Element>
  static void store_first(Vec v, Element* to, int64_t count) {
    Element padded[kLanes];
    store(v, padded);
    __builtin_memcpy(to, padded, static_cast<std::size_t>(count) * sizeof(Element));
  }

  static Real max_of_lanes(Vec v) {
    return fold<kLanes / 2>(v, [](Vec a, Vec b) { return max(a, b); })[0];
  }
  static Real sum_of_lanes(Vec v) {
    return fold<kLanes / 2>(v, [](Vec a, Vec b) { return a + b; })[0];
  }

  // Lane i: rows[i] folded to the number that max_of_lanes and sum_of_lanes fold it to.
  template <int kRows>
  static Vec max_of_rows(Vec (&rows)[kRows]) {
    return fold_rows<kLanes / 2, kRows>(rows, [](Vec a, Vec b) { return max(a, b); });
  }
  template <int kRows>
  static Vec sum_of_rows(Vec (&rows)[kRows]) {
    return fold_rows<kLanes / 2, kRows>(rows, [](Vec a, Vec b) { return a + b; });
  }

  // rows[i][j] := rows[j][i]. Each of the log2(kLanes) rounds interleaves the two halves.
  static void transpose(Vec (&rows)[kLanes]) {
    for (int round = 1; round < kLanes; round *= 2) {
      Vec mixed[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes / 2; ++i) {
        mixed[2 * i] = zip<0>(rows[i], rows[i + kLanes / 2], Lanes{});
        mixed[2 * i + 1] = zip<kLanes / 2>(rows[i], rows[i + kLanes / 2], Lanes{});
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
    }
  }

 private:
  // a[from], b[from], a[from + 1], b[from + 1], ...
  template <int kFrom, int... kLane>
  static Vec zip(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (kFrom + kLane / 2 + (kLane % 2) * kLanes)...);
  }
  template <int kDistance, int... kLane>
  static Vec swap(Vec v, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(v, v, (kLane ^ kDistance)...);
  }
  // Two rows become one vector: their halves are combined at the lanes of the first and the second.
  template <int kDistance, int... kLane>
  static Vec low_halves(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b,
                                   (kLane & kDistance ? kLane - kDistance + kLanes : kLane)...);
  }
  template <int kDistance, int... kLane>
  static Vec high_halves(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b,
                                   (kLane & kDistance ? kLane + kLanes : kLane + kDistance)...);
  }
  template <int kDistance, int kCount, int kRows, class Combine>
  static Vec fold_rows(Vec (&rows)[kRows], Combine combine) {
    if constexpr (kDistance == 0) {
      return rows[0];
    } else {
      constexpr int kLeft = kCount < kDistance ? kCount : kDistance;
#pragma GCC unroll 16
      for (int i = 0; i < kLeft; ++i) {
        const Vec other = rows[i + kDistance < kCount ? i + kDistance : i];
        rows[i] = combine(low_halves<kDistance>(rows[i], other, Lanes{}),
                          high_halves<kDistance>(rows[i], other, Lanes{}));
      }
      return fold_rows<kDistance / 2, kLeft>(rows, combine);
    }
  }

  template <int kDistance, class Combine>
  static Vec fold(Vec v, Combine combine) {
    if constexpr (kDistance == 0) {
      return v;
    } else {
      return fold<kDistance / 2>(combine(v, swap<kDistance>(v, Lanes{})), combine);
    }
  }
};

}  // namespace online_attention::cpu
