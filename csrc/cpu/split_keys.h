// SPDX-License-Identifier: BSD-3-Clause
// With few queries there may be fewer heads than threads. Their keys are then split: each part is
// the work of one thread and leaves a row's state and its unnormalised output, and the thread that
// ends the last part of a row joins them in the order of the keys. (E11), (E12)
//
// The split is by lengths alone, so that a result depends neither on the number of threads nor on
// the batch.
#pragma once

#include "core/problem.h"

namespace online_attention::cpu {

struct KeySplit {
  static constexpr int64_t kMaxQueries = 16;
  static constexpr int64_t kMaxParts = 32;     // bounds what their results take of memory and time
  static constexpr int64_t kFewestKeys = 512;  // of a part: enough to be worth a thread's while
  static constexpr int64_t kTileKeys = 128;    // parts begin where the tiles of every kernel do

  explicit KeySplit(const Shape& s) : s_kv(s.S_kv) {
    if (s.S_q > kMaxQueries || s.S_kv <= kFewestKeys) return;
    const int64_t parts = ceil_div(s.S_kv, kFewestKeys);
    keys = ceil_div(ceil_div(s.S_kv, parts < kMaxParts ? parts : kMaxParts), kTileKeys) * kTileKeys;
    count = ceil_div(s.S_kv, keys);
  }

  bool exists() const { return count > 1; }

  // Of the keys of `whole`, those of one part.
  KvRange part_of(KvRange whole, int64_t part) const {
    if (!exists()) return whole;
    const auto first = static_cast<int32_t>(part * keys);
    const auto end = static_cast<int32_t>(keys < s_kv - first ? first + keys : s_kv);
    const KvRange range = {first > whole.begin ? first : whole.begin,
                           end < whole.end ? end : whole.end};
    return range.size() > 0 ? range : KvRange{};
  }

  int64_t s_kv;
  int64_t count = 1;  // of parts
  int64_t keys = 0;   // of a part; 0: all
};

// One row of one part, as it lies in memory: the state, and from kOutput on the output.
struct RowPart {
  static constexpr int64_t kOutput = 64;  // bytes
  static int64_t bytes(int64_t D_v, int64_t real_bytes) {
    return kOutput + ceil_div(D_v * real_bytes, kOutput) * kOutput;
  }
};

// The parts of one row, `stride` bytes apart, and where the row goes.
struct RowParts {
  const std::byte* first = nullptr;
  int64_t stride = 0, count = 0;
  int64_t D_v = 0;
  double keep_scale = 1;  // (E45)
  void* out = nullptr;    // [D_v]
  void* lse = nullptr;
};

}  // namespace online_attention::cpu
