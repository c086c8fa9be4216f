// SPDX-License-Identifier: BSD-3-Clause
// The scores of one set of query rows with one key tile, block of rows by panel of keys, and what
// of them is visible. They are summed as the forward pass sums them, bit by bit: where scores are
// huge, P depends on that.
#pragma once

#include "cpu/few_rows_kernel.h"
#include "cpu/gradient_scratch.h"
#include "cpu/row_block.h"
#include "cpu/row_states.h"
#include "cpu/score_bias.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class TileScores {
 protected:
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
  static constexpr int kPart = kPartOfScores<Isa, Element>;
  static_assert(kTileKeys % kPanelKeys == 0 && kTileKeys % kBlockRows == 0);
  static_assert(kTileRows % kBlockRows == 0 && kBlockRows % kDepth == 0);

  template <int kRows>
  using Block = RowBlock<kRows>;

  TileScores(const KeyTile& tile, std::byte* scratch)
      : tile_(tile),
        keys_(tile.keys.end - tile.keys.begin),
        memory_(tile.D, tile.D_v, scratch),
        bias_(tile.bias_type, tile.bias_stride, tile.scale_log2),
        states_(bias_.factor()) {}

  template <class Visit>
  void for_each_block(Visit visit) const {
    // Few rows are rare here: they do not pay for code of their own. A block fills the steps that
    // are taken together.
    constexpr int kTogether = kDepth * Operand::kStepsTogether;
    for_each_row_block<kBlockRows, larger(kBlockRows / 2, kTogether)>(rows_->rows, visit);
  }

  void pack_keys() {
    if (tile_.in_place) return;
    for (int panel = 0; panel < keys_; panel += kPanelKeys) {
      pack_transposed<Operand, kPanelKeys>(memory_.k + panel * memory_.D_steps, tile_.D,
                                           keys_ - panel,
                                           [&](int i) { return key_row(panel + i); });
    }
  }

  void take_rows(const QueryRows& rows) {
    rows_ = &rows;
    for_each_block([&]<int kRows>(Block<kRows> block) {
      see(block);
      pack_queries(block);
    });
  }

  template <int kRows>
  void see(Block<kRows> block) {
    const int valid = block.row_begin + block.rows, end = block.row_begin + kRows;
    for (int row = block.row_begin; row < valid; ++row) states_.set(row, *rows_, tile_.keys);
    for (int row = valid; row < end; ++row) states_.set_empty(row);
    seen_[block.row_begin / kBlockRows] = states_.visible(block.row_begin, end, keys_);
  }

  template <int kRows>
  void pack_queries(Block<kRows> block) {
    const auto row = [&](int i) { return q_row(block.row_begin + smaller(i, block.rows - 1)); };
    Number* to = memory_.q + block.row_begin * q_stride();
    if (tile_.in_place) {
      pack_in_rows<Operand>(to, q_stride(), tile_.D, kRows, row);
    } else {
      pack_chunks<Operand, kRows>(to, tile_.D, block.rows, row);
    }
  }

  template <int kRows>
  const Visibility& seen(Block<kRows> block) const {
    return seen_[block.row_begin / kBlockRows];
  }

  template <int kRows>
  void multiply_scores(Block<kRows> block, Real* scores, int panel) const {
    const auto sign = static_cast<Real>(tile_.sign);
    const Number* q = memory_.q + block.row_begin * q_stride();
    if constexpr (Operand::kMultipliesInPlace) {
      if (tile_.in_place) {
        const auto row = [&](int i) { return key_row(panel + i); };
        return dot_queries_keys<Isa, Operand, kRows, kPanelKeys>(
            scores, q, q_stride(), tile_.D, smaller(keys_ - panel, kPanelKeys), row, sign);
      }
    }
    multiply_queries_keys<Operand, kRows, kBlockVecs, kPanelKeys, kPanelKeys, kPart>(
        scores, q, memory_.k + panel * memory_.D_steps, memory_.D_steps, sign);
  }

  // The bias enters the scores of one row and panel; those of hidden pairs become -inf.
  void hide_scores(int row, Real* scores, int panel) const {
    const KvRange seen = states_.visible(row);
    const int32_t first = tile_.keys.begin;
    bias_.apply(scores, kPanelKeys, bias_row(row), first + panel,
                {first + seen.begin, first + seen.end});
  }

  // Whether the bias hides one key.
  bool is_hidden(int row, int key) const {
    return bias_.exists() && bias_.hides(rows_->bias[row], tile_.keys.begin + key);
  }

  // nullptr without a bias, and for the padding of a block.
  const void* bias_row(int row) const {
    return bias_.exists() && row < rows_->rows ? rows_->bias[row] : nullptr;
  }

  const Element* key_row(int key) const {
    return static_cast<const Element*>(tile_.k) + key * tile_.k_stride;
  }
  const Element* q_row(int row) const { return static_cast<const Element*>(rows_->q[row]); }
  int64_t q_stride() const { return Memory::whole_vectors(memory_.D_steps); }

  static bool overlap(KvRange a, KvRange b) {
    return smaller(a.end, b.end) > larger(a.begin, b.begin);
  }
  static bool contains(KvRange outer, KvRange inner) {
    return outer.begin <= inner.begin && inner.end <= outer.end;
  }
  static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
  static constexpr int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

  const KeyTile& tile_;
  const int32_t keys_;
  const QueryRows* rows_ = nullptr;
  const Memory memory_;
  const ScoreBias<Isa, Element> bias_;
  RowStates<Isa, Element> states_;
  Visibility seen_[kTileRows / kBlockRows];
};

}  // namespace online_attention::cpu
