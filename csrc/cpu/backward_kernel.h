// SPDX-License-Identifier: BSD-3-Clause
// The gradients of attention between one key tile (up to 192 keys) and one set of query rows (up to
// 96), for one instruction set and one element type.
//
// A key tile stays with its thread while all query rows that see it pass. Its keys are packed once,
// transposed for the scores and in columns for dq, its values transposed for dP; its sums of dk and
// dv stay in the second-level cache. Scores and dP live in cells, kBlockRows rows by kPanelKeys
// keys, which become P and dS at once. P and dS of the whole set of rows, the left operands of the
// three products that follow, share that cache. A cell that nobody sees costs no product.
//
// Scores are summed as the forward pass sums them, bit by bit: where they are huge, P depends on
// that. Rows and keys with NaN or Inf enter the sums of dq, dk and dv one by one, and only where
// they are seen; the products have zeros in their place, because the weight 0 of a hidden pair
// would not stop them.
#pragma once

#include "cpu/gradient_scratch.h"
#include "cpu/row_block.h"
#include "cpu/row_states.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class TileBackward {
 public:
  static void prepare(const KeyTile& tile, const QueryRows& rows) {
    for (int row = 0; row < rows.rows; ++row) {
      const auto* q = static_cast<const Element*>(rows.q[row]);
      const auto* dout = static_cast<const Element*>(rows.dout[row]);
      rows.finite[row] =
          static_cast<uint8_t>((all_finite<Lanes>(q, tile.D) ? kFiniteQ : 0) |
                               (all_finite<Lanes>(dout, tile.D_v) ? kFiniteDout : 0));
      if (!tile.wants_ds) continue;
      // (E28)
      const Element* const factors[] = {dout, static_cast<const Element*>(rows.out[row])};
      Vec sum = {};
      for_each_vector<Lanes>(factors, tile.D_v,
                             [&](int64_t, const auto& v) { sum += v[0] * v[1]; });
      const auto* dlse = static_cast<const Real*>(rows.dlse);
      static_cast<Real*>(rows.delta)[row] =
          Lanes::sum_of_lanes(sum) - (dlse == nullptr ? Real(0) : dlse[row]);
    }
  }

  static void start(const KeyTile& tile, std::byte* scratch) {
    TileBackward backward(tile, scratch);
    backward.pack_keys();
    backward.zero_sums();
  }

  static void add(const KeyTile& tile, const QueryRows& rows, std::byte* scratch) {
    TileBackward backward(tile, scratch);
    backward.take_rows(rows);
    for (int panel = 0; panel < backward.keys_; panel += kPanelKeys) {
      backward.for_each_block([&]<int kRows>(Block<kRows> block) { backward.weigh(block, panel); });
    }
    if (tile.dv != nullptr) backward.add_dv();
    if (tile.dk != nullptr) backward.add_dk();
    if (tile.wants_dq) backward.multiply_dq();
  }

  static void add_dq(const KeyTile& tile, const QueryRows& rows, Turn turn, std::byte* scratch) {
    const TileBackward backward(tile, scratch);
    for (int row = 0; row < rows.rows; ++row) {
      const Real* part = backward.dq_row(row);
      auto* sum = static_cast<Real*>(rows.dq_sum[row]);
      const Real* const terms[] = {turn.first ? part : sum, part};
      for_each_vector<Lanes>(terms, tile.D, [&](int64_t d, const auto& v) {
        const Vec total = turn.first ? v[1] : v[0] + v[1];
        if (turn.last) {  // (E30)
          backward.store_scaled(total, static_cast<Element*>(rows.dq[row]) + d, tile.D - d);
        } else {
          store_some<Lanes>(total, sum + d, tile.D - d);
        }
      });
    }
  }

  static void finish(const KeyTile& tile, std::byte* scratch) {
    const TileBackward backward(tile, scratch);
    for (int key = 0; key < backward.keys_; ++key) {
      if (tile.dk != nullptr) {  // (E31)
        const Real* const sum[] = {backward.dk_row(key)};
        Element* to = static_cast<Element*>(tile.dk) + key * tile.dk_stride;
        for_each_vector<Lanes>(sum, tile.D, [&](int64_t d, const auto& v) {
          backward.store_scaled(v[0], to + d, tile.D - d);
        });
      }
      if (tile.dv != nullptr) {
        const Real* const sum[] = {backward.dv_row(key)};
        Element* to = static_cast<Element*>(tile.dv) + key * tile.dv_stride;
        for_each_vector<Lanes>(sum, tile.D_v, [&](int64_t d, const auto& v) {
          store_some<Lanes>(v[0], to + d, tile.D_v - d);
        });
      }
    }
  }

  static int64_t scratch_bytes(int64_t D, int64_t D_v) { return Memory(D, D_v, nullptr).bytes; }

 private:
  using Operand = typename Isa::template Operand<Element>;
  using Real = typename Operand::Real;
  using Number = typename Operand::Number;
  using Weight = typename Operand::Weight;
  using Lanes = Simd<Isa, Real>;
  using Vec = typename Lanes::Vec;
  using Memory = GradientScratch<Operand>;

  static constexpr int kLanes = Lanes::kLanes;
  static constexpr int kDepth = Operand::kDepth;
  static constexpr int kBlockRows = Isa::kBlockRows;
  static constexpr int kBlockVecs = Isa::kBlockVecs;
  static constexpr int kPanelKeys = kBlockVecs * kLanes;
  static constexpr int kTileKeys = Memory::kTileKeys;
  static constexpr int kTileRows = Memory::kTileRows;
  static constexpr int kStepStride = Memory::kStepStride;
  static constexpr int kRowStride = Memory::kRowStride;
  static constexpr int kPart = kPartOfScores<Isa, Element>;
  static_assert(kTileKeys % kPanelKeys == 0 && kTileKeys % kBlockRows == 0);
  static_assert(kTileRows % kBlockRows == 0 && kBlockRows % kDepth == 0);

  template <int kRows>
  using Block = RowBlock<kRows>;

  TileBackward(const KeyTile& tile, std::byte* scratch)
      : tile_(tile),
        keys_(tile.keys.end - tile.keys.begin),
        memory_(tile.D, tile.D_v, scratch),
        states_(tile.scale_log2) {}

  template <class Visit>
  void for_each_block(Visit visit) const {
    for_each_row_block<kBlockRows>(rows_->rows, visit);
  }

  void pack_keys() {
    for (int panel = 0; panel < keys_; panel += kPanelKeys) {
      const auto k_row = [&](int i) { return key_row(panel + i); };
      const auto v_row = [&](int i) {
        return static_cast<const Element*>(tile_.v) + (panel + i) * tile_.v_stride;
      };
      pack_transposed<Operand, kPanelKeys>(memory_.k + panel * memory_.D_steps, tile_.D,
                                           keys_ - panel, k_row);
      if (!tile_.wants_ds) continue;
      pack_transposed<Operand, kPanelKeys>(memory_.v + panel * memory_.D_v_steps, tile_.D_v,
                                           keys_ - panel, v_row);
    }
    if (!tile_.wants_dq) return;
    for (int key = 0; key < keys_; ++key) {
      memory_.key_is_finite[key] = all_finite<Lanes>(key_row(key), tile_.D);
    }
    pack_panels<Operand, kBlockVecs, Memory::kKeySteps>(
        memory_.k_columns, tile_.D, keys_,
        [&](int key) { return memory_.key_is_finite[key] ? key_row(key) : nullptr; });
  }

  void zero_sums() {
    const auto zero = [](auto* numbers, int64_t count) {
      __builtin_memset(numbers, 0, static_cast<std::size_t>(count) * sizeof *numbers);
    };
    if (tile_.dk != nullptr) zero(memory_.dk, kTileKeys * memory_.D_stride);
    if (tile_.dv != nullptr) zero(memory_.dv, kTileKeys * memory_.D_v_stride);
    // The last block of keys may reach beyond the last panel.
    if (keys_ == kTileKeys) return;
    zero(memory_.p, Memory::kRowSteps * kStepStride);
    zero(memory_.ds, Memory::kRowSteps * kStepStride);
  }

  void take_rows(const QueryRows& rows) {
    rows_ = &rows;
    for_each_block([&]<int kRows>(Block<kRows> block) {
      see(block);
      pack_rows(block);
    });
    const auto panels = [&](Number* to, int64_t D, const void* const* row, uint8_t finite) {
      pack_panels<Operand, kBlockVecs, Memory::kRowSteps>(to, D, rows.rows, [&](int i) {
        return rows.finite[i] & finite ? static_cast<const Element*>(row[i]) : nullptr;
      });
    };
    if (tile_.dk != nullptr) panels(memory_.q_columns, tile_.D, rows.q, kFiniteQ);
    if (tile_.dv != nullptr) panels(memory_.dout_columns, tile_.D_v, rows.dout, kFiniteDout);
  }

  template <int kRows>
  void see(Block<kRows> block) {
    const int valid = block.row_begin + block.rows, end = block.row_begin + kRows;
    for (int row = block.row_begin; row < valid; ++row) states_.set(row, *rows_, tile_.keys);
    for (int row = valid; row < end; ++row) states_.set_empty(row);
    seen_[block.row_begin / kBlockRows] = states_.visible(block.row_begin, end, keys_);
  }

  template <int kRows>
  void pack_rows(Block<kRows> block) {
    const auto q = [&](int i) { return q_row(block.row_begin + smaller(i, block.rows - 1)); };
    const auto dout = [&](int i) { return dout_row(block.row_begin + i); };
    if (tile_.in_place) {
      pack_in_rows<Operand>(memory_.q + block.row_begin * q_stride(), q_stride(), tile_.D, kRows,
                            q);
    } else {
      pack_chunks<Operand, kRows>(memory_.q + block.row_begin * q_stride(), tile_.D, block.rows, q);
    }
    if (!tile_.wants_ds) return;
    pack_chunks<Operand, kRows>(memory_.dout + block.row_begin * dout_stride(), tile_.D_v,
                                block.rows, dout);
  }

  // P and dS of one cell: the keys of one panel.
  template <int kRows>
  void weigh(Block<kRows> block, int panel) {
    const Visibility& seen = seen_[block.row_begin / kBlockRows];
    const KvRange cell = {panel, panel + kPanelKeys};
    if (!overlap(seen.by_some, cell)) return hide(block, panel);
    Real scores[kRows * kPanelKeys], dp[kRows * kPanelKeys];
    multiply_scores(block, scores, panel);
    if (tile_.wants_ds) {  // (E27)
      multiply_chunks_keys<Operand, kRows, kBlockVecs, kPart>(
          dp, memory_.dout + block.row_begin * dout_stride(), memory_.v + panel * memory_.D_v_steps,
          memory_.D_v_steps, Real(1));
    }
    if (contains(seen.by_all, cell)) {
      weigh_cell<kRows, false>(block, scores, dp, panel);
    } else {
      weigh_cell<kRows, true>(block, scores, dp, panel);
    }
  }

  template <int kRows>
  void multiply_scores(Block<kRows> block, Real* scores, int panel) const {
    const auto sign = static_cast<Real>(tile_.sign);
    if (tile_.in_place) {
      const auto row = [&](int i) { return key_row(panel + i); };
      dot_queries_keys<Operand, kRows, kPanelKeys>(scores, memory_.q + block.row_begin * q_stride(),
                                                   q_stride(), tile_.D,
                                                   smaller(keys_ - panel, kPanelKeys), row, sign);
    } else {
      multiply_chunks_keys<Operand, kRows, kBlockVecs, kPart>(
          scores, memory_.q + block.row_begin * q_stride(), memory_.k + panel * memory_.D_steps,
          memory_.D_steps, sign);
    }
  }

  template <int kRows, bool kMasked>
  void weigh_cell(Block<kRows> block, const Real* scores, const Real* dps, int panel) {
    for (int i = 0; i < kRows; i += kDepth) {
      for (int n = 0; n < kPanelKeys; n += kLanes) {
        Vec p[kDepth] = {}, ds[kDepth] = {};
        for (int r = 0; r < kDepth && i + r < kRows; ++r) {
          const int row = block.row_begin + i + r, at = (i + r) * kPanelKeys + n;
          p[r] = states_.probability(row, Lanes::load(scores + at));
          if (kMasked) p[r] = states_.if_visible(row, panel + n, p[r]);
          if (!tile_.wants_ds) continue;
          ds[r] = states_.score_gradient(row, p[r], Lanes::load(dps + at));
          if (kMasked) ds[r] = states_.if_visible(row, panel + n, ds[r]);
        }
        store_cell(p, ds, block.row_begin + i, panel + n);
      }
    }
  }

  template <int kRows>
  void hide(Block<kRows> block, int panel) {
    const Vec zeros[kDepth] = {};
    for (int i = 0; i < kRows; i += kDepth) {
      for (int n = 0; n < kPanelKeys; n += kLanes) {
        store_cell(zeros, zeros, block.row_begin + i, panel + n);
      }
    }
  }

  // kDepth rows from `row` on, kLanes keys from `key` on.
  void store_cell(const Vec (&p)[kDepth], const Vec (&ds)[kDepth], int row, int key) {
    const int64_t at = row / kDepth * kStepStride + key;
    if (tile_.dv != nullptr) Operand::store_step(p, memory_.p + at);
    if (!tile_.wants_ds) return;
    Number* columns[kDepth];
    for (int r = 0; r < kDepth; ++r) {
      columns[r] = memory_.ds_by_key + (row + r) * kRowStride + key / kDepth;
    }
    Operand::store_step(ds, memory_.ds + at, columns);
  }

  // (E26) dv += P^T dout
  void add_dv() {
    add_columns(memory_.dv, memory_.D_v_stride, memory_.p, memory_.dout_columns, tile_.D_v);
    for (int row = 0; row < rows_->rows; ++row) {
      if (rows_->finite[row] & kFiniteDout) continue;
      const KvRange seen = states_.visible(row);
      for (int key = seen.begin; key < seen.end; ++key) {
        add_row<Lanes>(dv_row(key), weight(memory_.p, row, key), dout_row(row), tile_.D_v);
      }
    }
  }

  // (E31) dk += dS^T q, to be scaled at the end
  void add_dk() {
    add_columns(memory_.dk, memory_.D_stride, memory_.ds, memory_.q_columns, tile_.D);
    for (int row = 0; row < rows_->rows; ++row) {
      if (rows_->finite[row] & kFiniteQ) continue;
      const KvRange seen = states_.visible(row);
      for (int key = seen.begin; key < seen.end; ++key) {
        add_row<Lanes>(dk_row(key), weight(memory_.ds, row, key), q_row(row), tile_.D);
      }
    }
  }

  // sums[key] += sum over rows of weights[row][key] * columns[row]
  void add_columns(Real* sums, int64_t stride, const Number* weights, const Number* columns,
                   int64_t D) {
    for_each_panel<kLanes, kBlockVecs>(D, [&](auto vecs, int64_t d) {
      constexpr int kVecs = decltype(vecs)::value;
      for (int key = 0; key < keys_; key += kBlockRows) {
        const KvRange steps = row_steps_that_see(key);
        if (steps.begin >= steps.end) continue;
        multiply_panel<Operand, kBlockRows, kVecs, 1, kStepStride, true>(
            sums + key * stride + d, stride, weights + steps.begin * kStepStride + key,
            columns + d * Memory::kRowSteps + steps.begin * kVecs * kLanes,
            steps.end - steps.begin);
      }
    });
  }

  // The steps of all blocks of rows of which one sees one of kBlockRows keys.
  KvRange row_steps_that_see(int key) const {
    KvRange rows = {rows_->rows, 0};
    for (int row = 0; row < rows_->rows; row += kBlockRows) {
      if (!overlap(seen_[row / kBlockRows].by_some, {key, key + kBlockRows})) continue;
      rows = {smaller(rows.begin, row), smaller(row + kBlockRows, rows_->rows)};
    }
    return {rows.begin / kDepth, static_cast<int32_t>(steps_of<Operand>(rows.end))};
  }

  // (E30) dq = dS k, to be scaled at the end
  void multiply_dq() {
    for_each_panel<kLanes, kBlockVecs>(tile_.D, [&](auto vecs, int64_t d) {
      constexpr int kVecs = decltype(vecs)::value;
      for_each_block([&]<int kRows>(Block<kRows> block) {
        const KvRange keys = seen_[block.row_begin / kBlockRows].by_some;
        const int32_t begin = keys.begin < keys.end ? keys.begin / kDepth : 0;
        multiply_panel<Operand, kRows, kVecs, kRowStride, 1, false>(
            dq_row(block.row_begin) + d, memory_.D_stride,
            memory_.ds_by_key + block.row_begin * kRowStride + begin,
            memory_.k_columns + d * Memory::kKeySteps + begin * kVecs * kLanes,
            steps_of<Operand>(keys.end) - begin);
      });
    });
    for (int key = 0; key < keys_; ++key) {
      if (memory_.key_is_finite[key]) continue;
      for (int row = 0; row < rows_->rows; ++row) {
        const KvRange seen = states_.visible(row);
        if (key < seen.begin || key >= seen.end) continue;
        add_row<Lanes>(dq_row(row), weight(memory_.ds, row, key), key_row(key), tile_.D);
      }
    }
  }

  static Real weight(const Number* steps, int row, int key) {
    Weight weights[kDepth];
    __builtin_memcpy(weights, steps + row / kDepth * kStepStride + key, sizeof weights);
    return Operand::widen(weights[row % kDepth]);
  }

  void store_scaled(Vec v, Element* to, int64_t elements) const {
    store_some<Lanes>(v * Lanes::splat(static_cast<Real>(tile_.factor)), to, elements);
  }

  const Element* key_row(int key) const {
    return static_cast<const Element*>(tile_.k) + key * tile_.k_stride;
  }
  const Element* q_row(int row) const { return static_cast<const Element*>(rows_->q[row]); }
  const Element* dout_row(int row) const { return static_cast<const Element*>(rows_->dout[row]); }
  Real* dq_row(int row) const { return memory_.dq + row * memory_.D_stride; }
  Real* dk_row(int key) const { return memory_.dk + key * memory_.D_stride; }
  Real* dv_row(int key) const { return memory_.dv + key * memory_.D_v_stride; }
  int64_t dout_stride() const { return Memory::whole_vectors(memory_.D_v_steps); }
  int64_t q_stride() const { return Memory::whole_vectors(memory_.D_steps); }

  static bool overlap(KvRange a, KvRange b) {
    return smaller(a.end, b.end) > larger(a.begin, b.begin);
  }
  static bool contains(KvRange outer, KvRange inner) {
    return outer.begin <= inner.begin && inner.end <= outer.end;
  }
  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
  static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

  const KeyTile& tile_;
  const int32_t keys_;
  const QueryRows* rows_ = nullptr;
  const Memory memory_;
  RowStates<Isa, Real> states_;
  Visibility seen_[kTileRows / kBlockRows];
};

template <class Isa, class Element>
GradientKernel gradient_kernel_of() {
  using Tile = TileBackward<Isa, Element>;
  return {Tile::scratch_bytes, Tile::prepare, Tile::start, Tile::add, Tile::add_dq, Tile::finish};
}

template <class Isa>
GradientKernel gradient_kernel_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return gradient_kernel_of<Isa, F16>();
    case DType::bf16:
      return gradient_kernel_of<Isa, Bf16>();
    case DType::f32:
      return gradient_kernel_of<Isa, float>();
    case DType::f64:
      break;
  }
  return gradient_kernel_of<Isa, double>();
}

}  // namespace online_attention::cpu
