// SPDX-License-Identifier: BSD-3-Clause
// AMX with AVX-512: products of whole tiles of bf16, in place of micro_kernel.h's and
// gradient_micro_kernel.h's. What those pack is what the tile registers take: queries in chunks and
// weights in rows are left operands as they lie; keys, values and other columns of pairs are right
// ones. One product takes Tiles::kRows steps, so that steps come in as many, with zeros behind the
// last; sums of a row do not depend on where its first visible key lies between them.
// In an unnamed namespace, for the reason that query_tile.h gives.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/gradient_micro_kernel.h"
#include "cpu/isa_avx512_bf16.h"

namespace online_attention::cpu::amx_bf16 {
namespace {

struct TilePairs : avx512_bf16::Pairs {
  static constexpr int kStepsTogether = Tiles::kRows;
  static constexpr int kFewestRows = Tiles::kRows;
  static constexpr bool kMultipliesInPlace = false;
};

struct Isa : avx512_bf16::Isa {
  static constexpr int kBlockRows = 2 * Tiles::kRows;  // 2 x 2 of 8 tiles hold sums
  template <class Element>
  using Operand = TilePairs;
};

template <class Operand>
concept OfTiles = std::is_same_v<Operand, TilePairs>;

// Tile registers: 0 to 3 hold sums, then come two left operands and two right ones.
constexpr int kLeft = 4, kRight = 6;

// Calls visit(row tile, column tile), as constants.
template <int kRowTiles, int kColumnTiles, class Visit>
[[gnu::always_inline]] inline void for_each_tile(Visit visit) {
  using Zero = std::integral_constant<int, 0>;
  using One = std::integral_constant<int, 1>;
  static_assert(kRowTiles <= 2 && kColumnTiles <= 2);
  visit(Zero{}, Zero{});
  if constexpr (kColumnTiles > 1) visit(Zero{}, One{});
  if constexpr (kRowTiles > 1) visit(One{}, Zero{});
  if constexpr (kRowTiles > 1 && kColumnTiles > 1) visit(One{}, One{});
}

// kRowTiles x kColumnTiles tiles of sums. Strides are of rows, in bytes.
template <int kRowTiles, int kColumnTiles>
struct TileSums {
  static void zero() {
    for_each<>([](auto r, auto c) { Tiles::zero<2 * r + c>(); });
  }
  static void load(const float* from, int64_t stride) {
    for_each<>([&](auto r, auto c) {
      Tiles::load<2 * r + c>(at(from, r * Tiles::kRows * stride + c * Tiles::kRowBytes), stride);
    });
  }
  static void store(float* to, int64_t stride) {
    for_each<>([&](auto r, auto c) {
      const float* const tile = at(to, r * Tiles::kRows * stride + c * Tiles::kRowBytes);
      Tiles::store<2 * r + c>(const_cast<float*>(tile), stride);
    });
  }
  // One product of Tiles::kRows steps.
  static void add(const void* left, int64_t left_stride, const void* right, int64_t right_stride) {
    for_each<1>([&](auto, auto c) {
      Tiles::load<kRight + c>(at(right, c * Tiles::kRowBytes), right_stride);
    });
    for_each<kRowTiles, 1>([&](auto r, auto) {
      Tiles::load<kLeft + r>(at(left, r * Tiles::kRows * left_stride), left_stride);
    });
    for_each<>([](auto r, auto c) { Tiles::multiply_add<2 * r + c, kLeft + r, kRight + c>(); });
  }

 private:
  template <int kRows = kRowTiles, int kColumns = kColumnTiles, class Visit>
  [[gnu::always_inline]] static void for_each(Visit visit) {
    for_each_tile<kRows, kColumns>(visit);
  }
  template <class T>
  static const T* at(const T* from, int64_t bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + bytes);
  }
  static const char* at(const void* from, int64_t bytes) {
    return static_cast<const char*>(from) + bytes;
  }
};

}  // namespace
}  // namespace online_attention::cpu::amx_bf16

namespace online_attention::cpu {

// multiply_queries_keys of micro_kernel.h, for q in chunks of kRows rows.
template <class Operand, int kRows, int kVecs, int kColumns, int kStride, int kPart>
  requires amx_bf16::OfTiles<Operand>
void multiply_queries_keys(typename Operand::Real* scores, const typename Operand::Number* q,
                           const typename Operand::Number* k, int64_t steps,
                           typename Operand::Real sign) {
  using amx_bf16::Tiles;
  using Sums = amx_bf16::TileSums<kRows / Tiles::kRows, kVecs>;
  Sums::zero();
  for (int64_t step = 0; step < steps; step += Tiles::kRows) {
    Sums::add(q + step * kRows, Tiles::kRowBytes, k + step * kColumns, kColumns * sizeof *k);
  }
  Sums::store(scores, kStride * sizeof *scores);
  if (sign == 1) return;
  using Lanes = typename Operand::Sums;
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kVecs; ++i) {
      float* s = scores + row * kStride + i * Lanes::kLanes;
      Lanes::store(Lanes::load(s) * Lanes::splat(sign), s);
    }
  }
}

// add_some_values of micro_kernel.h, on top of what `out` holds: narrow values leave no use for
// sums apart. A single row counts as all rows of a tile: its stride is 0.
template <class Operand, int kRows, int kVecs, int kStride, int kPart>
  requires amx_bf16::OfTiles<Operand>
void add_some_values(typename Operand::Real* out, int64_t out_stride,
                     const typename Operand::Real* alpha, const typename Operand::Weight* p,
                     const typename Operand::Number* v, int64_t v_stride, KvRange steps) {
  using amx_bf16::Tiles;
  using Lanes = typename Operand::Sums;
  constexpr int kRowTiles = kRows == 1 ? 1 : kRows / Tiles::kRows;
  constexpr int64_t kPBytes = kRows == 1 ? 0 : kStride * sizeof *p;
  const int64_t out_bytes = kRows == 1 ? 0 : out_stride * static_cast<int64_t>(sizeof *out);
  using Sums = amx_bf16::TileSums<kRowTiles, kVecs>;
  for (int row = 0; row < kRows; ++row) {
    if (alpha[row] == 1) continue;  // mostly: the maximum stays
#pragma GCC unroll 2
    for (int i = 0; i < kVecs; ++i) {
      float* o = out + row * out_stride + i * Lanes::kLanes;
      Lanes::store(Lanes::load(o) * Lanes::splat(alpha[row]), o);
    }
  }
  Sums::load(out, out_bytes);
  for (int64_t step = steps.begin; step < steps.end; step += Tiles::kRows) {
    Sums::add(p + step * Operand::kDepth, kPBytes, v + step * v_stride, v_stride * sizeof *v);
  }
  Sums::store(out, out_bytes);
}

// multiply_panel of gradient_micro_kernel.h. Where the left operand lies in steps (kRowStride is
// 1), it is turned into rows, a tile at a time.
template <class Operand, int kRows, int kVecs, int kRowStride, int kStepStride, bool kAdd>
  requires amx_bf16::OfTiles<Operand>
void multiply_panel(typename Operand::Real* out, int64_t out_stride,
                    const typename Operand::Number* a, const typename Operand::Number* b,
                    int64_t steps) {
  using amx_bf16::Tiles;
  using Lanes = typename Operand::Lanes;
  using Sums = amx_bf16::TileSums<kRows / Tiles::kRows, kVecs>;
  constexpr int64_t kWidth = kVecs * Lanes::kLanes;
  const int64_t out_bytes = out_stride * static_cast<int64_t>(sizeof *out);
  kAdd ? Sums::load(out, out_bytes) : Sums::zero();
  for (int64_t step = 0; step < steps; step += Tiles::kRows) {
    const auto add = [&](const typename Operand::Number* left, int64_t stride) {
      Sums::add(left, stride * sizeof *a, b + step * kWidth, kWidth * sizeof *b);
    };
    if constexpr (kStepStride == 1) {
      add(a + step, kRowStride);
      continue;
    }
    alignas(64) typename Operand::Number left[kRows * Lanes::kLanes];
    for (int row = 0; row < kRows; row += Lanes::kLanes) {
      typename Lanes::Vec tile[Lanes::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < Lanes::kLanes; ++i) {
        tile[i] = Lanes::load(a + (step + i) * kStepStride + row * kRowStride);
      }
      Lanes::transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < Lanes::kLanes; ++i)
        Lanes::store(tile[i], left + (row + i) * Lanes::kLanes);
    }
    add(left, Lanes::kLanes);
  }
  Sums::store(out, out_bytes);
}

}  // namespace online_attention::cpu
