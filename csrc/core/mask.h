// SPDX-License-Identifier: BSD-3-Clause
// Which keys a query sees. One type for no mask, causal (both alignments) and sliding windows: the
// visible pairs are those on a band of diagonals, so a mask is the band's two bounds.
#pragma once

#include <algorithm>

#include "core/hd.h"

namespace online_attention {

// Where the diagonal of a causal or windowed mask lies when S_q != S_kv.
enum class Alignment : int8_t {
  top_left,      // query 0 lies on key 0 (torch.nn.functional.scaled_dot_product_attention)
  bottom_right,  // the last query lies on the last key (decoding, flash-attention)
};

struct IndexRange {  // half open: [begin, end)
  int32_t begin = 0, end = 0;
  ONLINE_ATTENTION_HD int32_t size() const { return end > begin ? end - begin : 0; }
};
using KvRange = IndexRange;  // of keys
using QRange = IndexRange;   // of queries

// Query q_idx sees key kv_idx if 0 <= kv_idx < s_kv and
// diagonal_min <= kv_idx - q_idx <= diagonal_max.
struct Mask {
  static constexpr int32_t kUnbounded = std::numeric_limits<int32_t>::max();

  int32_t s_kv = 0;
  int32_t diagonal_min = -kUnbounded;
  int32_t diagonal_max = kUnbounded;

  // A window of `left` keys before and `right` keys after the query's own diagonal; kUnbounded for
  // a side without limit. Causal is right = 0.
  static Mask window(int32_t s_q, int32_t s_kv, Alignment alignment, int32_t left, int32_t right) {
    const int64_t offset = alignment == Alignment::bottom_right ? int64_t{s_kv} - s_q : 0;
    const auto bound = [](int64_t diagonal) {
      return static_cast<int32_t>(std::clamp(diagonal, -int64_t{kUnbounded}, int64_t{kUnbounded}));
    };
    Mask mask;
    mask.s_kv = s_kv;
    if (left != kUnbounded) mask.diagonal_min = bound(offset - left);
    if (right != kUnbounded) mask.diagonal_max = bound(offset + right);
    return mask;
  }
  static Mask full(int32_t s_kv) {
    return window(0, s_kv, Alignment::top_left, kUnbounded, kUnbounded);
  }
  static Mask causal(int32_t s_q, int32_t s_kv, Alignment alignment) {
    return window(s_q, s_kv, alignment, kUnbounded, 0);
  }

  ONLINE_ATTENTION_HD bool is_banded() const {
    return diagonal_min != -kUnbounded || diagonal_max != kUnbounded;
  }

  ONLINE_ATTENTION_HD bool visible(int32_t q_idx, int32_t kv_idx) const {
    const KvRange row = kv_range(q_idx, q_idx + 1);
    return row.begin <= kv_idx && kv_idx < row.end;
  }

  // The smallest range that holds every key some query of [q_begin, q_end) sees. Exact for a single
  // row: there it is the set of visible keys.
  ONLINE_ATTENTION_HD KvRange kv_range(int32_t q_begin, int32_t q_end) const {
    const int64_t first =
        diagonal_min == -kUnbounded ? 0 : max64(0, int64_t{q_begin} + diagonal_min);
    const int64_t last =
        diagonal_max == kUnbounded ? s_kv : min64(s_kv, int64_t{q_end} + diagonal_max);
    if (last <= first) return {0, 0};
    return {static_cast<int32_t>(first), static_cast<int32_t>(last)};
  }

  // The smallest range of the s_q queries that holds every one that sees some key of
  // [kv_begin, kv_end). Exact for a single key: there it is the set of queries that see it.
  ONLINE_ATTENTION_HD QRange q_range(int32_t kv_begin, int32_t kv_end, int32_t s_q) const {
    if (kv_end > s_kv) kv_end = s_kv;
    if (kv_end <= kv_begin) return {0, 0};
    const int64_t first =
        diagonal_max == kUnbounded ? 0 : max64(0, int64_t{kv_begin} - diagonal_max);
    const int64_t last =
        diagonal_min == -kUnbounded ? s_q : min64(s_q, int64_t{kv_end} - diagonal_min);
    if (last <= first) return {0, 0};
    return {static_cast<int32_t>(first), static_cast<int32_t>(last)};
  }

  // Whether some query of [q_begin, q_end) does not see some key of [kv_begin, kv_end): if not, the
  // tile needs no look at single elements.
  ONLINE_ATTENTION_HD bool tile_needs_mask(int32_t q_begin, int32_t q_end, int32_t kv_begin,
                                           int32_t kv_end) const {
    if (kv_end > s_kv) return true;
    const bool above = diagonal_max != kUnbounded && int64_t{kv_end} - 1 - q_begin > diagonal_max;
    const bool below =
        diagonal_min != -kUnbounded && int64_t{kv_begin} - (int64_t{q_end} - 1) < diagonal_min;
    return above || below;
  }

 private:
  ONLINE_ATTENTION_HD static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
  ONLINE_ATTENTION_HD static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
};

}  // namespace online_attention
