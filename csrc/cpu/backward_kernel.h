// SPDX-License-Identifier: BSD-3-Clause
// The gradients of attention between one key tile (up to 192 keys) and one set of query rows (up to
// 96), for one instruction set and one element type. Larger tiles were no faster, and leave fewer
// tasks for the threads.
//
// A key tile stays with its thread while all query rows that see it pass. Its keys are packed once,
// transposed for the scores and in columns for dq, its values transposed for dP; its sums of dk and
// dv stay in the second-level cache. Scores and dP live in cells, kBlockRows rows by kPanelKeys
// keys, which become P and dS at once. P and dS of the whole set of rows, the left operands of the
// three products that follow, share that cache. A cell that nobody sees costs no product.
//
// Rows and keys with NaN or Inf enter the sums of dq, dk and dv one by one, and only where
// they are seen; the products have zeros in their place, because the weight 0 of a hidden pair
// would not stop them.
#pragma once

#include "cpu/dropout_mask.h"
#include "cpu/far_rows.h"
#include "cpu/tile_scores.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class TileBackward : TileScores<Isa, Element> {
 public:
  static void start(const KeyTile& tile, std::byte* scratch) {
    TileBackward backward(tile, scratch);
    backward.pack_keys();
    backward.zero_sums();
  }

  static void add(const KeyTile& tile, const QueryRows& rows, const QueryRows* next, int slot,
                  std::byte* scratch) {
    TileBackward backward(tile, scratch);
    backward.take_rows(rows);
    SetAhead<Isa, Element> ahead(tile, rows, next, kPanelKeys, kBlockRows);
    for (int panel = 0; panel < backward.keys_; panel += kPanelKeys) {
      backward.for_each_block([&]<int kRows>(Block<kRows> block) {
        ahead.fetch_some();
        backward.weigh(block, panel);
      });
    }
    if (tile.dv != nullptr) backward.add_dv();
    if (tile.dk != nullptr) backward.add_dk();
    if (tile.wants_dq) backward.multiply_dq(slot);
  }

  static void add_dq(const KeyTile& tile, const QueryRows& rows, int slot, Turn turn,
                     std::byte* scratch) {
    const TileBackward backward(tile, scratch);
    for (int row = 0; row < rows.rows; ++row) {
      const Real* part = backward.dq_row(slot, row);
      auto* sum = static_cast<Real*>(rows.dq_sum[row]);
      const Real* const terms[] = {turn.first ? part : sum, part};
      for_each_vector<Lanes>(terms, tile.D, [&](int64_t d, const auto& v) {
        const Vec total = turn.first ? v[1] : v[0] + v[1];
        if (turn.last) {  // (E30)
          auto* dq = static_cast<Element*>(rows.dq[row]) + d;
          store_some<Lanes>(total * Lanes::splat(static_cast<Real>(tile.factor)), dq, tile.D - d);
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
        Element* to = static_cast<Element*>(tile.dk) + key * tile.dk_stride;
        store_row(backward.dk_row(key), static_cast<Real>(tile.factor), to, tile.D);
      }
      if (tile.dv != nullptr) {
        Element* to = static_cast<Element*>(tile.dv) + key * tile.dv_stride;
        store_row(backward.dv_row(key), Real(1), to, tile.D_v);
      }
    }
  }

  static int64_t scratch_bytes(int64_t D, int64_t D_v) { return Memory(D, D_v, nullptr).bytes; }

 private:
  using Base = TileScores<Isa, Element>;
  using typename Base::Lanes, typename Base::Memory, typename Base::Number, typename Base::Operand;
  using typename Base::Real, typename Base::Vec;
  template <int kRows>
  using Block = RowBlock<kRows>;
  using Base::bias_, Base::is_hidden, Base::keys_, Base::memory_, Base::rows_, Base::seen_,
      Base::states_, Base::tile_;
  using Base::contains, Base::for_each_block, Base::key_row, Base::multiply_scores, Base::overlap;
  using Base::kBlockRows, Base::kBlockVecs, Base::kDepth, Base::kLanes, Base::kPanelKeys,
      Base::kPart;
  using Base::larger, Base::q_row, Base::seen, Base::smaller;

  using Weight = typename Operand::Weight;
  static constexpr int kTileKeys = Memory::kTileKeys;
  static constexpr int kStepStride = Memory::kStepStride;
  static constexpr int kRowStride = Memory::kRowStride;

  // dP in smaller parts than the scores: much of it cancels against delta.
  static constexpr int kPartOfDp = kPart <= 32 || sizeof(Element) < sizeof(Real) ? kPart : 32;

  using Base::Base;

  void pack_keys() {
    Base::pack_keys();
    for (int panel = 0; panel < keys_ && tile_.wants_ds; panel += kPanelKeys) {
      const auto row = [&](int i) {
        return static_cast<const Element*>(tile_.v) + (panel + i) * tile_.v_stride;
      };
      pack_transposed<Operand, kPanelKeys>(memory_.v + panel * memory_.D_v_steps, tile_.D_v,
                                           keys_ - panel, row);
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
    // The last block of keys may reach beyond the last panel.
    const auto round_up = [&](int to) { return (keys_ + to - 1) / to * to; };
    const int begin = round_up(kPanelKeys), end = round_up(kBlockRows);
    if (tile_.dk != nullptr) zero(memory_.dk, end * memory_.D_stride);
    if (tile_.dv != nullptr) zero(memory_.dv, end * memory_.D_v_stride);
    for (int step = 0; step < Memory::kRowSteps && begin < end; ++step) {
      zero(memory_.p + step * kStepStride + begin, end - begin);
      zero(memory_.ds + step * kStepStride + begin, end - begin);
    }
  }

  void take_rows(const QueryRows& rows) {
    Base::take_rows(rows);
    if (tile_.dropout.exists) draw(rows);
    if (tile_.wants_ds) {
      for_each_block([&]<int kRows>(Block<kRows> block) {
        const auto row = [&](int i) { return dout_row(block.row_begin + i); };
        pack_chunks<Operand, kRows>(memory_.dout + block.row_begin * dout_stride(), tile_.D_v,
                                    block.rows, row);
      });
    }
    const auto panels = [&](Number* to, int64_t D, const void* const* row, uint8_t finite) {
      pack_panels<Operand, kBlockVecs, Memory::kRowSteps>(to, D, rows.rows, [&](int i) {
        return rows.finite[i] & finite ? static_cast<const Element*>(row[i]) : nullptr;
      });
    };
    if (tile_.dk != nullptr) panels(memory_.q_columns, tile_.D, rows.q, kFiniteQ);
    if (tile_.dv != nullptr) panels(memory_.dout_columns, tile_.D_v, rows.dout, kFiniteDout);
  }

  // What decides of dropout, for the pairs that the rows see.
  void draw(const QueryRows& rows) {
    using Random = DropoutBits<Isa>;
    static_assert(kTileKeys % Random::kGroupKeys == 0);
    for (int row = 0; row < rows.rows; ++row) {
      Random::generate(tile_.dropout, rows.head[row], rows.q_idx[row], tile_.keys.begin,
                       states_.visible(row), memory_.random + row * kTileKeys);
    }
  }

  // P and dS of one cell: the keys of one panel.
  template <int kRows>
  void weigh(Block<kRows> block, int panel) {
    const KvRange cell = {panel, panel + kPanelKeys};
    if (!overlap(seen(block).by_some, cell) || hidden_by_bias(block, cell)) {
      return hide(block, panel);
    }
    alignas(64) Real scores[kRows * kPanelKeys], dp[kRows * kPanelKeys];
    multiply_scores(block, scores, panel);
    if (tile_.wants_ds) {  // (E27)
      multiply_queries_keys<Operand, kRows, kBlockVecs, kPanelKeys, kPanelKeys, kPartOfDp>(
          dp, memory_.dout + block.row_begin * dout_stride(), memory_.v + panel * memory_.D_v_steps,
          memory_.D_v_steps, Real(1));
    }
    if (bias_.exists() || tile_.dropout.exists) {
      for (int i = 0; i < kRows; ++i) {
        Base::hide_scores(block.row_begin + i, scores + i * kPanelKeys, panel);
      }
      weigh_cell<kRows, Look::at_pairs>(block, scores, dp, panel);
    } else if (contains(seen(block).by_all, cell)) {
      weigh_cell<kRows, Look::at_nothing>(block, scores, dp, panel);
    } else {
      weigh_cell<kRows, Look::at_ranges>(block, scores, dp, panel);
    }
  }

  template <int kRows>
  bool hidden_by_bias(Block<kRows> block, KvRange cell) const {
    const int32_t first = tile_.keys.begin;
    return bias_.hides_all(rows_->bias + block.row_begin, block.rows,
                           {first + cell.begin, first + smaller(cell.end, keys_)});
  }

  // What tells the hidden pairs of a cell: there are none; the rows' ranges; scores of -inf, of
  // which a visible pair has no weight either. Only in the last case there may be dropout.
  enum class Look { at_nothing, at_ranges, at_pairs };

  template <int kRows, Look kLook>
  void weigh_cell(Block<kRows> block, const Real* scores, const Real* dps, int panel) {
    for (int i = 0; i < kRows; i += kDepth) {
      for (int n = 0; n < kPanelKeys; n += kLanes) {
        Vec p[kDepth] = {}, ds[kDepth] = {};
        for (int r = 0; r < kDepth && i + r < kRows; ++r) {
          const int row = block.row_begin + i + r, at = (i + r) * kPanelKeys + n;
          const Vec score = Lanes::load(scores + at);
          const auto shown = [&](Vec x) -> Vec {
            if constexpr (kLook == Look::at_ranges) return states_.if_visible(row, panel + n, x);
            if constexpr (kLook == Look::at_nothing) return x;
            return score == Lanes::splat(-kInfinity<Real>) ? Vec{} : x;
          };
          const auto drop = [&](Vec x) -> Vec {
            if constexpr (kLook != Look::at_pairs) return x;
            return tile_.dropout.exists ? dropped(x, row, panel + n) : x;
          };
          const Vec probability = shown(states_.probability(row, score));
          p[r] = drop(probability);
          if (!tile_.wants_ds) continue;
          ds[r] = shown(states_.score_gradient(row, probability, drop(Lanes::load(dps + at))));
        }
        store_cell(p, ds, block.row_begin + i, panel + n);
      }
    }
  }

  // (E46) x for the kLanes keys from `key` on: 0 where dropped, scaled where kept.
  Vec dropped(Vec x, int row, int key) const {
    // The padding of a block sees nothing: any bits do.
    const uint16_t* random = memory_.random + smaller(row, rows_->rows - 1) * kTileKeys + key;
    return kept<Lanes>(x, random, tile_.dropout.threshold) *
           Lanes::splat(static_cast<Real>(tile_.dropout.keep_scale));
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
    add_others(memory_.dv, memory_.D_v_stride, memory_.p, rows_->dout, kFiniteDout, tile_.D_v);
  }

  // (E31) dk += dS^T q, to be scaled at the end
  void add_dk() {
    add_columns(memory_.dk, memory_.D_stride, memory_.ds, memory_.q_columns, tile_.D);
    add_others(memory_.dk, memory_.D_stride, memory_.ds, rows_->q, kFiniteQ, tile_.D);
  }

  // The same sums over the rows that are not finite.
  void add_others(Real* sums, int64_t stride, const Number* weights, const void* const* rows,
                  uint8_t finite, int64_t D) {
    for (int row = 0; row < rows_->rows; ++row) {
      if (rows_->finite[row] & finite) continue;
      const auto* elements = static_cast<const Element*>(rows[row]);
      const KvRange seen = states_.visible(row);
      for (int key = seen.begin; key < seen.end; ++key) {
        if (is_hidden(row, key)) continue;
        add_row<Lanes>(sums + key * stride, weight(weights, row, key), elements, D);
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
    return {first_step_with<Operand>(rows.begin),
            static_cast<int32_t>(steps_of<Operand>(rows.end))};
  }

  // (E30) dq = dS k, to be scaled at the end: the same sum, bit by bit, whether its parts are of
  // one tile or of several.
  void multiply_dq(int slot) {
    multiply_dq(slot, {0, smaller(tile_.dq_keys, keys_)});
    for (int begin = tile_.dq_keys; begin < keys_; begin += tile_.dq_keys) {
      multiply_dq(Memory::kSpareSlot, {begin, smaller(begin + tile_.dq_keys, keys_)});
      for (int row = 0; row < rows_->rows; ++row) {
        add_row<Lanes>(dq_row(slot, row), Real(1), dq_row(Memory::kSpareSlot, row), tile_.D);
      }
    }
  }

  void multiply_dq(int slot, KvRange part) {
    for_each_panel<kLanes, kBlockVecs>(tile_.D, [&](auto vecs, int64_t d) {
      constexpr int kVecs = decltype(vecs)::value;
      for_each_block([&]<int kRows>(Block<kRows> block) {
        const KvRange some = seen(block).by_some;
        KvRange keys = {larger(some.begin, part.begin), smaller(some.end, part.end)};
        if (keys.begin >= keys.end) keys = {};
        const int32_t begin = first_step_with<Operand>(keys.begin);
        multiply_panel<Operand, kRows, kVecs, kRowStride, 1, false>(
            dq_row(slot, block.row_begin) + d, memory_.D_stride,
            memory_.ds_by_key + block.row_begin * kRowStride + begin,
            memory_.k_columns + d * Memory::kKeySteps + begin * kVecs * kLanes,
            steps_of<Operand>(keys.end) - begin);
      });
    });
    for (int key = part.begin; key < part.end; ++key) {
      if (memory_.key_is_finite[key]) continue;
      for (int row = 0; row < rows_->rows; ++row) {
        const KvRange seen = states_.visible(row);
        if (key < seen.begin || key >= seen.end || is_hidden(row, key)) continue;
        add_row<Lanes>(dq_row(slot, row), weight(memory_.ds, row, key), key_row(key), tile_.D);
      }
    }
  }

  static Real weight(const Number* steps, int row, int key) {
    Weight weights[kDepth];
    __builtin_memcpy(weights, steps + row / kDepth * kStepStride + key, sizeof weights);
    return Operand::widen(weights[row % kDepth]);
  }

  static void store_row(const Real* row, Real factor, Element* to, int64_t D) {
    for (int64_t d = 0; d < D; d += kLanes) {
      store_some<Lanes>(Lanes::load(row + d) * Lanes::splat(factor), to + d, D - d);
    }
  }

  const Element* dout_row(int row) const { return static_cast<const Element*>(rows_->dout[row]); }
  Real* dq_row(int slot, int row) const {
    return memory_.dq + (slot * Memory::kTileRows + row) * memory_.D_stride;
  }
  Real* dk_row(int key) const { return memory_.dk + key * memory_.D_stride; }
  Real* dv_row(int key) const { return memory_.dv + key * memory_.D_v_stride; }
  int64_t dout_stride() const { return Memory::whole_vectors(memory_.D_v_steps); }
};

template <class Isa, class Element>
GradientKernel gradient_kernel_of() {
  using Tile = TileBackward<Isa, Element>;
  return {Tile::scratch_bytes,
          prepare_rows<Isa, Element>,
          FarRows<Isa, Element>::measure,
          Tile::start,
          Tile::add,
          Tile::add_dq,
          Tile::finish};
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
