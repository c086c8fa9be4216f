// SPDX-License-Identifier: BSD-3-Clause
// Attention of one query tile by online softmax, for one instruction set and one element type.
//
// Keys pass in tiles of kTileKeys. Each is packed once, as Operand asks (keys transposed, values in
// rows), and then used by the query rows, kBlockRows at a time, whose scores stay in the
// first-level cache between the two products. A row's result is the same whichever rows share its
// block or tile: the order of its sums depends on D, the keys and QueryTile::in_place alone.
#pragma once

#include "cpu/dropout_mask.h"
#include "cpu/micro_kernel.h"
#include "cpu/queries_in_lanes.h"
#include "cpu/query_tile.h"
#include "cpu/row_block.h"
#include "cpu/row_results.h"
#include "cpu/score_bias.h"
#include "cpu/softmax_rows.h"
#include "cpu/weigh.h"

namespace online_attention::cpu {

// kInPlace: QueryTile::in_place.
template <class Isa, class Element, bool kInPlace>
class TileForward {
 public:
  static void attend(const QueryTile& tile, std::byte* scratch) {
    TileForward forward(tile, scratch);
    forward.for_each_block([&]<int kRows>(Block<kRows> block) { forward.start(block); });
    const KvRange visible = tile.some_row_sees;
    for (int64_t begin = visible.begin - visible.begin % kTileKeys; begin < visible.end;
         begin += kTileKeys) {
      const auto keys_begin = static_cast<int32_t>(begin);
      const KvRange keys = {keys_begin, keys_begin + smaller(kTileKeys, visible.end - keys_begin)};
      if constexpr (!kInPlace) forward.pack_keys(keys);
      forward.take_values(keys);
      if constexpr (!kInPlace) forward.ahead_.begin(tile, forward.tile_after(keys), kTileKeys);
      if constexpr (kMayUseLanes) forward.in_lanes_.multiply(keys);
      forward.values_of_tile_ = Values::unknown;
      forward.for_each_block([&]<int kRows>(Block<kRows> block) { forward.add(block, keys); });
    }
    forward.for_each_block([&]<int kRows>(Block<kRows> block) { forward.finish(block); });
  }

  static int64_t scratch_bytes(int64_t D, int64_t D_v) {
    const int64_t numbers = query_numbers(D) + key_numbers(D) + value_numbers(D_v);
    return out_reals(D_v) * static_cast<int64_t>(sizeof(Real)) +
           numbers * static_cast<int64_t>(sizeof(Number));
  }

 private:
  using Operand = typename Isa::template Operand<Element>;
  using Real = typename Operand::Real;
  using Number = typename Operand::Number;
  using Weight = typename Operand::Weight;
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;

  static constexpr int kLanes = Lanes::kLanes;
  // Rows in place come in powers of 2 more often than not: those of a group of heads.
  static constexpr int kBlockRows = kInPlace ? 8 : Isa::kBlockRows;
  static constexpr int kBlockVecs = Isa::kBlockVecs;
  static constexpr int kPanelKeys = kBlockVecs * kLanes;  // the keys of one micro-kernel
  static constexpr int kTileKeys = 512 / static_cast<int>(sizeof(Real));
  static_assert(kTileKeys % kPanelKeys == 0 && KeySplit::kTileKeys % kTileKeys == 0);
  // Weights take the place of their row's scores.
  static constexpr int kWeightStride = kTileKeys * static_cast<int>(sizeof(Real) / sizeof(Weight));
  // Sums in parts have smaller rounding errors, which do not matter beside those of narrow
  // elements. Few rows wait for memory and have time for them.
  static constexpr bool kNarrow = sizeof(Element) < sizeof(Real);
  static constexpr int kPartOfTile = kNarrow || !kInPlace ? kWeightStride : 32;
  static constexpr int kPart = kPartOfScores<Isa, Element>;
  // Where products take steps of values together, all of these have scores.
  static constexpr bool kHalfPanels = Operand::kStepsTogether == 1;

  using InLanes = QueriesInLanes<Isa, Operand, kTileKeys, kPart>;
  static constexpr bool kMayUseLanes = kInPlace && InLanes::kExist;

  template <int kRows>
  using Block = RowBlock<kRows>;

  TileForward(const QueryTile& tile, std::byte* scratch)
      : tile_(tile),
        bias_(tile.bias_type, tile.bias_stride, tile.scale_log2),
        factor_(bias_.factor()),
        D_steps_(steps_of<Operand>(tile.D)),
        out_stride_(whole_vectors(tile.D_v)),
        out_(reinterpret_cast<Real*>(scratch)),
        q_(reinterpret_cast<Number*>(out_ + out_reals(tile.D_v))),
        k_(q_ + query_numbers(tile.D)),
        packed_v_(k_ + key_numbers(tile.D)),
        in_lanes_(tile, q_) {}

  template <class Visit>
  void for_each_block(Visit visit) const {
    for_each_row_block<kBlockRows, Operand::kFewestRows>(tile_.rows, visit);
  }

  template <int kRows>
  void start(Block<kRows> block) {
    const auto row = [&](int i) {
      return static_cast<const Element*>(tile_.q[block.row_begin + i]);
    };
    if constexpr (!kInPlace) {
      pack_chunks<Operand, kRows>(q_ + block.row_begin * q_stride(), tile_.D, block.rows, row);
    } else if (!in_lanes()) {
      pack_in_rows<Operand>(q_ + block.row_begin * q_stride(), q_stride(), tile_.D, kRows,
                            [&](int i) { return row(smaller(i, block.rows - 1)); });
    }
    Real* out = out_row(block.row_begin);
    for (int64_t i = 0; i < kRows * out_stride_; ++i) out[i] = 0;
  }

  bool in_lanes() const { return kMayUseLanes && tile_.in_lanes; }

  void pack_keys(KvRange keys) {
    Number* panel = k_;
    for (int32_t begin = keys.begin; begin < keys.end; begin += kPanelKeys) {
      const Element* first = static_cast<const Element*>(tile_.k) + begin * tile_.k_stride;
      const auto row = [&](int i) { return first + i * tile_.k_stride; };
      pack_transposed<Operand, kPanelKeys>(panel, tile_.D, keys.end - begin, row);
      panel += kPanelKeys * D_steps_;
    }
  }

  // The values of the tile `keys`: where they lie, or packed.
  void take_values(KvRange keys) {
    if (!kInPlace || tile_.D_v % kLanes != 0) return pack_values(keys, keys);
    values_lie_ = {static_cast<const Element*>(tile_.v) + keys.begin * tile_.v_stride,
                   tile_.v_stride, keys.size()};
  }

  // The values of `wanted`, a part of the tile `keys`; zeros for keys that share a step with them,
  // and for those that the bias of `row` hides if it is given.
  void pack_values(KvRange wanted, KvRange keys, const void* bias_row = nullptr) {
    const int64_t D_v = tile_.D_v;
    const auto* v = static_cast<const Element*>(tile_.v);
    values_lie_ = {};
    if constexpr (Operand::kDepth == 1 && sizeof(Element) == sizeof(Number)) {
      if (D_v % kLanes == 0 && bias_row == nullptr) {
        v_ = v + keys.begin * tile_.v_stride;
        v_stride_ = tile_.v_stride;
        return;
      }
    }
    v_ = packed_v_;
    v_stride_ = out_stride_;
    const KvRange steps = steps_that_hold(wanted, keys);
    for (int32_t step = steps.begin; step < steps.end; ++step) {
      const Element* rows[Operand::kDepth];
      for (int i = 0; i < Operand::kDepth; ++i) {
        const int32_t key = keys.begin + step * Operand::kDepth + i;
        const bool seen = wanted.begin <= key && key < wanted.end &&
                          (bias_row == nullptr || !bias_.hides(bias_row, key));
        rows[i] = seen ? v + key * tile_.v_stride : nullptr;
      }
      pack_columns<Operand>(packed_v_ + step * v_stride_, rows, D_v);
    }
  }

  // Counted from the tile's first key.
  static KvRange steps_that_hold(KvRange wanted, KvRange keys) {
    return {first_step_with<Operand>(wanted.begin - keys.begin),
            static_cast<int32_t>(steps_of<Operand>(wanted.end - keys.begin))};
  }
  static KvRange keys_of(KvRange steps, KvRange keys) {
    return {keys.begin + steps.begin * Operand::kDepth,
            smaller(keys.begin + steps.end * Operand::kDepth, keys.end)};
  }

  // One step of the online softmax: the rows of `block` take in the keys of one tile.
  template <int kRows>
  void add(Block<kRows> block, KvRange keys) {
    const Visibility seen = visibility(block, keys);
    if (seen.by_some.begin >= seen.by_some.end ||
        bias_.hides_all(tile_.bias + block.row_begin, block.rows, seen.by_some))
      return;
    alignas(64) Real own_scores[kRows * kTileKeys];
    Real* const scores = in_lanes() ? in_lanes_.scores(block.row_begin) : own_scores;
    alignas(64) Real alpha[kWholeVectors<Lanes, kRows>];
    const KvRange panels = multiply(block, scores, seen.by_some, keys);
    if (bias_.exists() ||
        !contains(seen.by_all, {keys.begin + panels.begin, keys.begin + panels.end})) {
      hide(block, scores, cut_by_mask(seen, panels, keys.begin), keys.begin);
    }
    weigh_rows<Isa, Operand, kRows, kTileKeys>(softmax_, block.row_begin, scores, alpha, panels,
                                               factor_, [&] {
                                                 if constexpr (!kInPlace) ahead_.fetch_values();
                                               });
    for (int i = 0; tile_.dropout.exists && i < block.rows; ++i) {
      drop_weights<Isa, Lanes, kTileKeys>(weights_of(scores + i * kTileKeys), panels, keys.begin,
                                          tile_, block.row_begin + i);
    }
    const KvRange steps = steps_that_hold(seen.by_some, keys);
    const KvRange touched = keys_of(steps, keys);
    const bool all_visible = !bias_.exists() && contains(seen.by_all, touched);
    if (all_visible || finite(keys) || values_finite(touched)) {
      add_values_of(block, alpha, weights_of(scores), steps, keys);
    } else {
      add_values_one_by_one(block, alpha, weights_of(scores), keys);
    }
  }

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

  // scores := q k^T on the whole panels that hold the keys of `wanted`; returns the panels' keys,
  // counted from the tile's first.
  template <int kRows>
  KvRange multiply(Block<kRows> block, Real* scores, KvRange wanted, KvRange keys) {
    const auto sign = static_cast<Real>(tile_.sign);
    const int32_t count = wanted.end - keys.begin;
    if constexpr (kInPlace) {
      const int32_t begin = (wanted.begin - keys.begin) / kLanes * kLanes;
      const KvRange vectors = {begin, static_cast<int32_t>(whole_vectors(count))};
      if (in_lanes()) return vectors;
      const int32_t first = keys.begin + begin;
      const auto* k = static_cast<const Element*>(tile_.k) + first * tile_.k_stride;
      const auto key = [&](int i) { return k + i * tile_.k_stride; };
      dot_queries_keys<Isa, Operand, kRows, kTileKeys>(
          scores + begin, q_ + block.row_begin * q_stride(), q_stride(), tile_.D, count - begin,
          key, sign, rows_ahead(block, tile_.v, tile_.v_stride, tile_.D_v, {first, wanted.end}));
      return vectors;
    }
    const Number* q = q_ + block.row_begin * q_stride();
    const int32_t begin = (wanted.begin - keys.begin) / kPanelKeys * kPanelKeys;
    int32_t key = begin;
    for (; key < count; key += kPanelKeys) {
      ahead_.fetch_keys(kRows * kPanelKeys);
      const Number* panel = k_ + key * D_steps_;
      if (kHalfPanels && count - key <= kLanes) {
        multiply_queries_keys<Operand, kRows, 1, kPanelKeys, kTileKeys, kPart>(
            scores + key, q, panel, D_steps_, sign);
        return {begin, key + kLanes};
      }
      multiply_queries_keys<Operand, kRows, kBlockVecs, kPanelKeys, kTileKeys, kPart>(
          scores + key, q, panel, D_steps_, sign);
    }
    return {begin, key};
  }

  // The bias enters the scores; those that a row does not see, or where a panel has no key, become
  // -inf.
  template <int kRows>
  void hide(Block<kRows> block, Real* scores, KvRange panels, int32_t first_key) const {
    for (int i = 0; i < kRows; ++i) {
      // The padding takes the last row's mask.
      const int row = block.row_begin + smaller(i, block.rows - 1);
      bias_.apply(scores + i * kTileKeys + panels.begin, panels.size(), bias_row(row),
                  first_key + panels.begin, tile_.visible[row]);
    }
  }

  // The vectors of some panels that may hold hidden keys.
  KvRange cut_by_mask(const Visibility& seen, KvRange panels, int32_t first_key) const {
    if (bias_.exists() || seen.by_all.begin > first_key + panels.begin) return panels;
    const int32_t all_see = larger(seen.by_all.end - first_key, panels.begin);
    return {all_see / kLanes * kLanes, panels.end};
  }

  const void* bias_row(int row) const { return bias_.exists() ? tile_.bias[row] : nullptr; }

  static Weight* weights_of(Real* scores) { return reinterpret_cast<Weight*>(scores); }

  // Of keys or values: asked for once, by the first block.
  template <int kRows>
  RowsAhead<Element> rows_ahead(Block<kRows> block, const void* matrix, int64_t stride,
                                int64_t elements, KvRange keys) const {
    if (block.row_begin > 0) return {};
    return {static_cast<const Element*>(matrix) + keys.begin * stride, stride, elements,
            keys.size()};
  }

  KvRange tile_after(KvRange keys) const {
    return {keys.end, smaller(keys.end + kTileKeys, tile_.some_row_sees.end)};
  }

  // out := alpha * out + p v over `steps` of the tile, for the rows of `block`.
  template <int kRows>
  void add_values_of(Block<kRows> block, const Real* alpha, const Weight* p, KvRange steps,
                     KvRange keys) const {
    Real* out = out_row(block.row_begin);
    if constexpr (kInPlace) {
      if (values_lie_.count > 0) {
        add_values_in_place<Isa, Operand, kRows, kWeightStride, kPartOfTile>(
            out, out_stride_, alpha, p, values_lie_, tile_.D_v, steps,
            rows_ahead(block, tile_.k, tile_.k_stride, tile_.D, tile_after(keys)));
        return;
      }
    }
    add_values<Operand, kRows, kBlockVecs, kWeightStride, kPartOfTile>(out, out_stride_, alpha, p,
                                                                       v_, v_stride_, steps);
  }

  // Of two rows in one block one may see a NaN value that is hidden from the other, whose weight 0
  // would not stop it. Here each row touches only the values that it sees.
  template <int kRows>
  void add_values_one_by_one(Block<kRows> block, const Real* alpha, const Weight* p, KvRange keys) {
    for (int i = 0; i < block.rows; ++i) {
      const int row = block.row_begin + i;
      const KvRange seen = row_keys(row, keys);
      if (seen.begin >= seen.end) continue;
      pack_values(seen, keys, bias_row(row));
      add_values_of(Block<1>{row, 1}, alpha + i, p + i * kWeightStride, steps_that_hold(seen, keys),
                    keys);
    }
    take_values(keys);
  }

  bool values_finite(KvRange wanted) const {
    return all_finite<Lanes>(static_cast<const Element*>(tile_.v) + wanted.begin * tile_.v_stride,
                             wanted.size(), tile_.v_stride, tile_.D_v);
  }

  // Whether all values of the tile are finite: looked for once, where some block has to know.
  enum class Values { unknown, finite, not_finite };
  bool finite(KvRange keys) {
    if (values_of_tile_ == Values::unknown) {
      values_of_tile_ = values_finite(keys) ? Values::finite : Values::not_finite;
    }
    return values_of_tile_ == Values::finite;
  }

  template <int kRows>
  void finish(Block<kRows> block) const {
    using Results = RowResults<Isa, Element>;
    const int64_t D_v = tile_.D_v;
    for (int row = block.row_begin; row < block.row_begin + block.rows; ++row) {
      const SoftmaxRow<Real> softmax = softmax_.row(row);
      void *out = tile_.out[row], *lse = tile_.lse[row];
      if (tile_.is_part) {
        Results::write_part(softmax, out_row(row), D_v, out, lse);
      } else {
        Results::write(softmax, out_row(row), D_v, tile_.dropout.keep_scale, out, lse);
      }
    }
  }

  int64_t q_stride() const { return whole_vectors(D_steps_); }
  Real* out_row(int row) const { return out_ + row * out_stride_; }

  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
  static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
  static int64_t whole_vectors(int64_t numbers) { return (numbers + kLanes - 1) / kLanes * kLanes; }

  static int64_t out_reals(int64_t D_v) { return QueryTile::kMaxRows * whole_vectors(D_v); }
  static int64_t query_numbers(int64_t D) {
    return (QueryTile::kMaxRows + kBlockRows) * whole_vectors(steps_of<Operand>(D));
  }
  static int64_t key_numbers(int64_t D) { return kTileKeys * steps_of<Operand>(D); }
  static int64_t value_numbers(int64_t D_v) {
    return steps_of<Operand>(kTileKeys) * whole_vectors(D_v);
  }

  const QueryTile& tile_;
  const ScoreBias<Isa, Element> bias_;
  const Real factor_;  // brings scores to base-2 units
  const int64_t D_steps_;
  const int64_t out_stride_;
  Real* const out_;            // [rows][out_stride_], unnormalised
  Number* const q_;            // per block [D_steps_][kRows]
  Number* const k_;            // per panel [D_steps_][kPanelKeys]
  Number* const packed_v_;     // [steps of a tile][out_stride_]
  const Number* v_ = nullptr;  // packed_v_, or the caller's own rows
  int64_t v_stride_ = 0;
  ValueRows<Element> values_lie_ = {};  // in the caller's memory; empty if v_ has them
  TileAhead<Element> ahead_;
  Values values_of_tile_ = Values::unknown;
  SoftmaxRows<Lanes, Real, QueryTile::kMaxRows, kBlockRows> softmax_;
  InLanes in_lanes_;
};

}  // namespace online_attention::cpu
