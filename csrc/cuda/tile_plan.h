// SPDX-License-Identifier: BSD-3-Clause
// How one attention call is cut into thread blocks. Host code makes the plan, kernels read it.
//
// A block computes `tile_m` query rows of one head against one range of keys. Where the query
// heads of a group are short, they are packed: row r of a packed head is query r / pack of head
// r % pack of the group, so that the keys and values they share are read once.
#pragma once

#include "core/problem.h"
#include "core/softmax_row.h"

namespace online_attention::cuda {

struct TileCoord {
  int32_t b, h;  // batch element; first query head of the tile
  int32_t q_tile, split;
  int32_t column_block;  // which part of D_v
};

struct TilePlan {
  static constexpr int64_t kMaxTiles = std::numeric_limits<int32_t>::max();

  int32_t tile_m = 0, tile_n = 0;
  int32_t pack = 1;            // query heads in one tile: 1 or H / H_kv
  int32_t rows = 0;            // of one packed head: S_q * pack
  int32_t keys_per_split = 0;  // a multiple of tile_n
  int32_t group = 1;           // H / H_kv
  uint32_t pack_inverse = 0;   // floor(2^32 / pack) + 1, or 0 if pack is 1: see query_of
  // Counts, unsigned because the device divides by them.
  uint32_t q_tiles = 0;        // of one packed head
  uint32_t column_blocks = 1;  // that share a query tile, each with its part of D_v
  uint32_t splits = 1;         // parts of the keys, merged by combine
  uint32_t section_heads = 1;  // packed heads whose tiles are interleaved, see locate
  uint32_t lead_heads = 0;     // the first of them, in smaller sections
  uint32_t lead_section_heads = 1;
  uint32_t heads = 0;  // B * H / pack
  uint32_t heads_per_batch = 1;

  ONLINE_ATTENTION_HD int64_t tiles() const {
    return int64_t{heads} * q_tiles * splits * column_blocks;
  }

  // Blocks start in index order. Within a section of heads whose keys and values fit the L2 cache
  // together, later query tiles come first: under a causal mask they see the most keys, and the
  // short tiles are left to fill the gaps at the end.
  // `index` < tiles() <= kMaxTiles.
  ONLINE_ATTENTION_HD TileCoord locate(uint32_t index) const {
    return locate_among(index, 0, heads, section_heads);
  }

  // The same, but the first lead_heads go in sections of lead_section_heads: the fewer heads are
  // begun at once, the less waits for memory at once.
  ONLINE_ATTENTION_HD TileCoord locate_led(uint32_t index) const {
    const uint32_t lead_tiles = lead_heads * q_tiles * splits * column_blocks;
    return index < lead_tiles ? locate_among(index, 0, lead_heads, lead_section_heads)
                              : locate_among(index - lead_tiles, lead_heads, heads, section_heads);
  }

  // Of the heads [first, end), in sections of `section`.
  ONLINE_ATTENTION_HD TileCoord locate_among(uint32_t index, uint32_t first, uint32_t end,
                                             uint32_t section) const {
    const uint32_t column_block = index % column_blocks;
    index /= column_blocks;
    const uint32_t split = index % splits;
    index /= splits;
    const uint32_t section_tiles = section * q_tiles;
    const uint32_t first_head = first + index / section_tiles * section;
    index %= section_tiles;
    const uint32_t heads_left = end - first_head;
    const uint32_t heads_here = heads_left < section ? heads_left : section;
    const uint32_t head = first_head + index % heads_here;
    return {static_cast<int32_t>(head / heads_per_batch),
            static_cast<int32_t>(head % heads_per_batch) * pack,
            static_cast<int32_t>(q_tiles - 1 - index / heads_here), static_cast<int32_t>(split),
            static_cast<int32_t>(column_block)};
  }

  // row / pack as a multiplication, exact because kMaxPack keeps row * pack under 2^32. Rows are
  // packed only where one head has fewer than tile_m of them.
  static constexpr int32_t kMaxPack = 4096;
  ONLINE_ATTENTION_HD int32_t query_of(int32_t row) const {
    if (pack == 1) return row;
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(row)} * pack_inverse >> 32);
  }

  // The queries whose rows lie in this tile, [begin, end).
  ONLINE_ATTENTION_HD int32_t query_begin(int32_t q_tile) const {
    return query_of(q_tile * tile_m);
  }
  ONLINE_ATTENTION_HD int32_t query_end(int32_t q_tile) const {
    const int64_t end = (int64_t{q_tile} + 1) * tile_m;
    return query_of(static_cast<int32_t>(end < rows ? end : rows) - 1) + 1;
  }

  // The keys that some row of the tile sees, cut to this split. Begins at a multiple of the key
  // tile, so that no key tile crosses into the next split.
  ONLINE_ATTENTION_HD KvRange keys(const Mask& mask, const TileCoord& at) const {
    KvRange range = mask.kv_range(query_begin(at.q_tile), query_end(at.q_tile));
    range.begin -= range.begin % tile_n;
    return cut_to_split(range, at.split);
  }

  ONLINE_ATTENTION_HD KvRange cut_to_split(KvRange range, int32_t split) const {
    if (splits == 1) return range;
    const int64_t begin = int64_t{split} * keys_per_split;
    const int64_t end = begin + keys_per_split;
    if (begin >= range.end || end <= range.begin) return {0, 0};
    if (range.begin < begin) range.begin = static_cast<int32_t>(begin);
    if (range.end > end) range.end = static_cast<int32_t>(end);
    return range;
  }
};

// What a kernel offers the plan.
struct TileShape {
  int32_t m, n;           // rows and keys of a tile
  int32_t column_blocks;  // ceil(D_v / the columns that one block computes)
  int32_t blocks_per_sm;  // resident at once
  bool packs = true;      // several heads' rows in one tile
  bool splits = true;     // one row's keys over several blocks
  int merge_tiles = 0;    // what merging splits costs, in key tiles
};

// Chooses packing, splits and order. Depends on lengths alone if args.batch_invariant. Callers keep
// B * H below 2^31 and no size but S_kv 0; a call of more than kMaxTiles tiles gets a plan that
// launch() refuses.
TilePlan plan_tiles(const ForwardArgs& args, const TileShape& tile, int multiprocessors);

// The partial results of a plan with more than one split, in the workspace: outputs before
// normalisation [splits, B * H * S_q, D_v] in the accumulator's type, then the rows' states
// [splits, B * H * S_q].
template <typename Real>
struct SplitBuffers {
  Real* out = nullptr;
  SoftmaxRow<Real>* states = nullptr;
  int64_t rows = 0;

  static int64_t bytes(const TilePlan& plan, const Shape& shape) {
    if (plan.splits == 1) return 0;
    const int64_t row_bytes = padded_columns(shape) * sizeof(Real) + sizeof(SoftmaxRow<Real>);
    return plan.splits * shape.B * shape.H * shape.S_q * row_bytes;
  }
  static SplitBuffers in(void* workspace, const TilePlan& plan, const Shape& shape) {
    if (plan.splits == 1) return {};
    const int64_t rows = shape.B * shape.H * shape.S_q;
    Real* out = static_cast<Real*>(workspace);
    Real* behind = out + plan.splits * rows * padded_columns(shape);
    return {out, reinterpret_cast<SoftmaxRow<Real>*>(behind), rows};
  }
  // Even, so that the states behind the outputs are aligned.
  ONLINE_ATTENTION_HD static int64_t padded_columns(const Shape& shape) {
    return shape.D_v + shape.D_v % 2;
  }
};

}  // namespace online_attention::cuda
