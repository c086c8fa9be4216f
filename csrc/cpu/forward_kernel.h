// SPDX-License-Identifier: BSD-3-Clause
// Attention of one query tile by online softmax, for one instruction set and one element type.
//
// Keys pass in tiles of kTileKeys. Each is packed once (keys transposed, values in rows, both
// widened to the type computed in) and then used by the query rows, kBlockRows at a time, whose
// scores stay in the first-level cache between the two products. A row's result is the same
// whichever rows share its block or tile: its sums run over D and over the keys in order.
#pragma once

#include "cpu/exp2.h"
#include "cpu/micro_kernel.h"
#include "cpu/query_tile.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class TileForward {
 public:
  static void attend(const QueryTile& tile, std::byte* scratch) {
    TileForward forward(tile, reinterpret_cast<Real*>(scratch));
    forward.for_each_block([&]<int kRows>(Block<kRows> block) { forward.start(block); });
    const int32_t first = tile.some_row_sees.begin - tile.some_row_sees.begin % kTileKeys;
    for (int32_t begin = first; begin < tile.some_row_sees.end; begin += kTileKeys) {
      const KvRange keys = {begin, smaller(begin + kTileKeys, tile.some_row_sees.end)};
      forward.pack_keys(keys);
      forward.pack_values(keys);
      forward.for_each_block([&]<int kRows>(Block<kRows> block) { forward.add(block, keys); });
    }
    forward.for_each_block([&]<int kRows>(Block<kRows> block) { forward.finish(block); });
  }

  static int64_t scratch_bytes(int64_t D, int64_t D_v) {
    const int64_t numbers = query_numbers(D) + key_numbers(D) + value_numbers(D_v) +
                            QueryTile::kMaxRows * whole_vectors(D_v);
    return numbers * static_cast<int64_t>(sizeof(Real));
  }

 private:
  using Real = RealOf<Element>;
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;

  static constexpr int kLanes = Lanes::kLanes;
  static constexpr int kBlockRows = Isa::kBlockRows;
  static constexpr int kBlockVecs = Isa::kBlockVecs;
  static constexpr int kPanelKeys = kBlockVecs * kLanes;  // the keys of one micro-kernel
  static constexpr int kTileKeys = 512 / static_cast<int>(sizeof(Real));
  static_assert(kTileKeys % kPanelKeys == 0);

  // Rows [row_begin, row_begin + rows) of the tile; the block is padded to kRows.
  template <int kRows>
  struct Block {
    int row_begin, rows;
  };

  TileForward(const QueryTile& tile, Real* scratch)
      : tile_(tile),
        out_stride_(whole_vectors(tile.D_v)),
        q_(scratch),
        k_(q_ + query_numbers(tile.D)),
        out_(k_ + key_numbers(tile.D)),
        packed_v_(out_ + QueryTile::kMaxRows * out_stride_) {}

  // Calls visit on blocks of kBlockRows rows; the last is of half as many, or a quarter, ... if
  // that is enough.
  template <class Visit>
  void for_each_block(Visit visit) const {
    int row = 0;
    for (; row + kBlockRows <= tile_.rows; row += kBlockRows) {
      visit(Block<kBlockRows>{row, kBlockRows});
    }
    if (row < tile_.rows) visit_last_block<kBlockRows>(row, visit);
  }
  template <int kRows, class Visit>
  void visit_last_block(int row, Visit visit) const {
    if constexpr (kRows > 1) {
      if (tile_.rows - row <= kRows / 2) return visit_last_block<kRows / 2>(row, visit);
    }
    visit(Block<kRows>{row, tile_.rows - row});
  }

  template <int kRows>
  void start(Block<kRows> block) {
    const auto row = [&](int i) {
      return static_cast<const Element*>(tile_.q[block.row_begin + i]);
    };
    pack_transposed<Lanes, kRows>(q_ + block.row_begin * tile_.D, tile_.D, block.rows, row);
    Real* out = out_row(block.row_begin);
    for (int64_t i = 0; i < kRows * out_stride_; ++i) out[i] = 0;
  }

  void pack_keys(KvRange keys) {
    Real* panel = k_;
    for (int32_t begin = keys.begin; begin < keys.end; begin += kPanelKeys) {
      const Element* first = static_cast<const Element*>(tile_.k) + begin * tile_.k_stride;
      const auto row = [&](int i) { return first + i * tile_.k_stride; };
      pack_transposed<Lanes, kPanelKeys>(panel, tile_.D, keys.end - begin, row);
      panel += kPanelKeys * tile_.D;
    }
  }

  void pack_values(KvRange keys) {
    const int64_t D_v = tile_.D_v;
    const Element* row = static_cast<const Element*>(tile_.v) + keys.begin * tile_.v_stride;
    if constexpr (sizeof(Element) == sizeof(Real)) {
      if (D_v % kLanes == 0) {
        v_ = reinterpret_cast<const Real*>(row);
        v_stride_ = tile_.v_stride;
        return;
      }
    }
    v_ = packed_v_;
    v_stride_ = whole_vectors(D_v);
    Real* to = packed_v_;
    for (int32_t key = keys.begin; key < keys.end; ++key, row += tile_.v_stride, to += v_stride_) {
      int64_t d = 0;
      for (; d + kLanes <= D_v; d += kLanes) Lanes::store(Lanes::load(row + d), to + d);
      if (d < D_v) Lanes::store(Lanes::load_first(row + d, D_v - d), to + d);
    }
  }

  // One step of the online softmax: the rows of `block` take in the keys of one tile.
  template <int kRows>
  void add(Block<kRows> block, KvRange keys) {
    const Visibility seen = visibility(block, keys);
    if (seen.by_some.begin >= seen.by_some.end) return;
    Real scores[kRows * kTileKeys];
    Real alpha[kRows];
    const KvRange panels = multiply(block, scores, seen.by_some, keys);
    if (!contains(seen.by_all, panels)) hide(block, scores, panels, keys);
    const int panel_keys = panels.end - panels.begin;
    for (int i = 0; i < kRows; ++i) {
      SoftmaxRow<Real>& row = rows_[block.row_begin + i];
      Real* s = scores + i * kTileKeys + (panels.begin - keys.begin);
      const Real tile_max = largest(s, panel_keys) * static_cast<Real>(tile_.scale_log2);
      // (E6), where raise gives exactly 1 if the maximum stays.
      alpha[i] = tile_max <= row.m ? Real(1) : row.raise(tile_max);
      const Real tile_sum = weigh(s, panel_keys, row.base());  // (E7) scores become p
      row.absorb(alpha[i], tile_sum);                          // (E8)
    }
    if (contains(seen.by_all, seen.by_some) || values_finite(seen.by_some, keys)) {
      add_values_of<kRows>(out_row(block.row_begin), alpha, scores, seen.by_some, keys);
    } else {
      add_values_one_by_one(block, alpha, scores, keys);
    }
  }

  // Of the keys of one tile, those that some row, and those that all rows of a block see.
  struct Visibility {
    KvRange by_some, by_all;
  };

  template <int kRows>
  Visibility visibility(Block<kRows> block, KvRange keys) const {
    if (contains(tile_.all_rows_see, keys)) return {keys, keys};
    Visibility seen = {{keys.end, keys.begin}, keys};
    for (int i = 0; i < block.rows; ++i) {
      const KvRange row = row_keys(block.row_begin + i, keys);
      seen.by_all = {larger(seen.by_all.begin, row.begin), smaller(seen.by_all.end, row.end)};
      if (row.begin >= row.end) continue;
      seen.by_some = {smaller(seen.by_some.begin, row.begin), larger(seen.by_some.end, row.end)};
    }
    return seen;
  }

  static bool contains(KvRange outer, KvRange inner) {
    return outer.begin <= inner.begin && inner.end <= outer.end;
  }

  // The keys of the tile that one row sees.
  KvRange row_keys(int row, KvRange keys) const {
    const KvRange visible = tile_.visible[row];
    return {larger(visible.begin, keys.begin), smaller(visible.end, keys.end)};
  }

  // scores := q k^T on the whole panels that hold the keys of `wanted`; returns the panels' keys.
  template <int kRows>
  KvRange multiply(Block<kRows> block, Real* scores, KvRange wanted, KvRange keys) const {
    const Real* q = q_ + block.row_begin * tile_.D;
    const auto sign = static_cast<Real>(tile_.sign);
    const int32_t begin = (wanted.begin - keys.begin) / kPanelKeys * kPanelKeys;
    int32_t key = begin;
    for (; key < wanted.end - keys.begin; key += kPanelKeys) {
      multiply_queries_keys<Lanes, kRows, kBlockVecs, kTileKeys>(scores + key, q,
                                                                 k_ + key * tile_.D, tile_.D, sign);
    }
    return {keys.begin + begin, keys.begin + key};
  }

  // scores := -inf where a row does not see the key, or where a panel has none.
  template <int kRows>
  void hide(Block<kRows> block, Real* scores, KvRange panels, KvRange keys) const {
    using Integer = typename Lanes::Integer;
    for (int i = 0; i < kRows; ++i) {
      // The padding takes the last row's mask.
      const KvRange visible = tile_.visible[block.row_begin + smaller(i, block.rows - 1)];
      const auto begin = Lanes::splat_bits(static_cast<Integer>(visible.begin));
      const auto end = Lanes::splat_bits(static_cast<Integer>(visible.end));
      auto key = Lanes::iota() + Lanes::splat_bits(static_cast<Integer>(panels.begin));
      Real* s = scores + i * kTileKeys - keys.begin;
      for (int32_t n = panels.begin; n < panels.end; n += kLanes) {
        const auto hidden = (key < begin) | (key >= end);
        Lanes::store(hidden ? Lanes::splat(-kInfinity<Real>) : Lanes::load(s + n), s + n);
        key += Lanes::splat_bits(kLanes);
      }
    }
  }

  // A NaN is passed over, as in max_of: it reaches the row through its weight.
  static Real largest(const Real* s, int count) {
    Vec m = Lanes::splat(-kInfinity<Real>);
    for (int n = 0; n < count; n += kLanes) m = Lanes::max(Lanes::load(s + n), m);
    return Lanes::max_of_lanes(m);
  }

  // s := 2^(s * scale_log2 - base); returns the sum.
  Real weigh(Real* s, int count, Real base) const {
    const Vec scale_log2 = Lanes::splat(static_cast<Real>(tile_.scale_log2));
    Vec sum = {};
    for (int n = 0; n < count; n += kLanes) {
      const Vec x = Lanes::load(s + n) * scale_log2 - Lanes::splat(base);
      const Vec p = exp2_of_lanes<Lanes, Real>(x);
      Lanes::store(p, s + n);
      sum += p;
    }
    return Lanes::sum_of_lanes(sum);
  }

  // out := alpha * out + p v over the keys of `wanted`, for kRows rows of p and out.
  template <int kRows>
  void add_values_of(Real* out, const Real* alpha, const Real* p, KvRange wanted,
                     KvRange keys) const {
    const int32_t skipped = wanted.begin - keys.begin;
    p += skipped;
    const Real* v = v_ + skipped * v_stride_;
    const int count = wanted.end - wanted.begin;
    int64_t d = 0;
    for (; d + kBlockVecs * kLanes <= out_stride_; d += kBlockVecs * kLanes) {
      add_values<Lanes, kRows, kBlockVecs, kTileKeys>(out + d, out_stride_, alpha, p, v + d,
                                                      v_stride_, count);
    }
    for (; d < out_stride_; d += kLanes) {
      add_values<Lanes, kRows, 1, kTileKeys>(out + d, out_stride_, alpha, p, v + d, v_stride_,
                                             count);
    }
  }

  // Of two rows in one block one may see a NaN value that is hidden from the other, whose weight 0
  // would not stop it. Here each row touches only the values that it sees.
  template <int kRows>
  void add_values_one_by_one(Block<kRows> block, const Real* alpha, const Real* p, KvRange keys) {
    for (int i = 0; i < block.rows; ++i) {
      const int row = block.row_begin + i;
      const KvRange seen = row_keys(row, keys);
      if (seen.begin >= seen.end) continue;
      add_values_of<1>(out_row(row), alpha + i, p + i * kTileKeys, seen, keys);
    }
  }

  bool values_finite(KvRange wanted, KvRange keys) const {
    Vec zero_or_nan = {};
    for (int32_t key = wanted.begin; key < wanted.end; ++key) {
      const Real* row = v_ + (key - keys.begin) * v_stride_;
      for (int64_t d = 0; d < out_stride_; d += kLanes) {
        zero_or_nan += Lanes::load(row + d) * Lanes::splat(0);
      }
    }
    return Lanes::sum_of_lanes(zero_or_nan) == 0;
  }

  template <int kRows>
  void finish(Block<kRows> block) const {
    for (int row = block.row_begin; row < block.row_begin + block.rows; ++row) {
      const Vec inverse_sum = Lanes::splat(rows_[row].inverse_sum());  // (E9)
      const Real* from = out_row(row);
      Element* to = static_cast<Element*>(tile_.out[row]);
      int64_t d = 0;
      for (; d + kLanes <= tile_.D_v; d += kLanes) {
        Lanes::store(Lanes::load(from + d) * inverse_sum, to + d);
      }
      if (d < tile_.D_v) {
        Lanes::store_first(Lanes::load(from + d) * inverse_sum, to + d, tile_.D_v - d);
      }
      *static_cast<Real*>(tile_.lse[row]) = rows_[row].lse();  // (E10)
    }
  }

  Real* out_row(int row) const { return out_ + row * out_stride_; }

  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
  static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
  static int64_t whole_vectors(int64_t numbers) { return (numbers + kLanes - 1) / kLanes * kLanes; }

  // The vector more is for pack_transposed's last store.
  static int64_t query_numbers(int64_t D) {
    return whole_vectors((QueryTile::kMaxRows + kBlockRows) * D) + kLanes;
  }
  static int64_t key_numbers(int64_t D) { return kTileKeys * D + kLanes; }
  static int64_t value_numbers(int64_t D_v) { return kTileKeys * whole_vectors(D_v); }

  const QueryTile& tile_;
  const int64_t out_stride_;
  Real* const q_;    // per block [D][kRows]
  Real* const k_;    // per panel [D][kPanelKeys]
  Real* const out_;  // [rows][out_stride_], unnormalised
  Real* const packed_v_;
  const Real* v_ = nullptr;  // [kTileKeys][v_stride_]: packed, or the caller's own rows
  int64_t v_stride_ = 0;
  SoftmaxRow<Real> rows_[QueryTile::kMaxRows + kBlockRows];
};

template <class Isa>
TileKernel tile_kernel_of(DType dtype) {
  const auto kernel = []<class Element>(Element) {
    return TileKernel{TileForward<Isa, Element>::scratch_bytes, TileForward<Isa, Element>::attend};
  };
  switch (dtype) {
    case DType::f16:
      return kernel(F16{});
    case DType::bf16:
      return kernel(Bf16{});
    case DType::f32:
      return kernel(float{});
    case DType::f64:
      break;
  }
  return kernel(double{});
}

}  // namespace online_attention::cpu
