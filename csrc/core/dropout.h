// SPDX-License-Identifier: BSD-3-Clause
// Dropout of probabilities: which pairs of a query and a key are dropped is a function of the pair
// and of a random state, so that the backward pass finds the same ones, and every device does.
//
// The random bits are those of Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", 2011). One call serves eight keys of one query, 16 bits for each.
#pragma once

#include "core/hd.h"

namespace online_attention {

struct Philox4x32 {
  uint32_t words[4];

  ONLINE_ATTENTION_HD static Philox4x32 of(const uint32_t (&counter)[4], uint64_t key) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(b);
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }
};

struct Dropout {
  static constexpr uint32_t kOutcomes = 1u << 16;

  // Two numbers, where the kernel can read them: the key and the last word of the counter. nullptr:
  // nothing is dropped.
  const uint64_t* state = nullptr;
  uint32_t threshold = 0;  // a pair whose 16 bits are below it is dropped

  // The probability is rounded to a multiple of 2^-16, below 1; keep_scale() is that of the rounded
  // one, so that expectations are exact.
  static Dropout of(double probability, const uint64_t* state) {
    const auto threshold = static_cast<uint32_t>(probability * kOutcomes + 0.5);
    return {state, threshold < kOutcomes ? threshold : kOutcomes - 1};
  }

  ONLINE_ATTENTION_HD bool exists() const { return state != nullptr; }
  // What the pairs that are kept are multiplied by.
  template <typename Real = float>
  ONLINE_ATTENTION_HD Real keep_scale() const {
    return static_cast<Real>(kOutcomes) / static_cast<Real>(kOutcomes - threshold);
  }

  // The eight keys of a call are pairs of neighbours, 8 apart: those that one lane holds of a row
  // in the tensor cores' layout (cuda/fragment.cuh). Key kv_idx takes bits [16 e, 16 e + 16) of
  // call `call_of(kv_idx)` of its query, e = element_of(kv_idx).
  static constexpr int32_t kKeysOfCall = 8, kKeysOfGroup = 32;
  ONLINE_ATTENTION_HD static int32_t call_of(int32_t kv_idx) {
    return kv_idx / 32 * 4 + kv_idx / 2 % 4;
  }
  ONLINE_ATTENTION_HD static int32_t element_of(int32_t kv_idx) {
    return kv_idx % 32 / 8 * 2 + kv_idx % 2;
  }

  // `head` counts among the B * H.
  ONLINE_ATTENTION_HD Philox4x32 bits(int64_t head, int32_t q_idx, int32_t call) const {
    const uint32_t counter[4] = {static_cast<uint32_t>(call), static_cast<uint32_t>(q_idx),
                                 static_cast<uint32_t>(head), static_cast<uint32_t>(state[1])};
    return Philox4x32::of(counter, state[0]);
  }
  ONLINE_ATTENTION_HD bool keeps(const Philox4x32& bits, int element) const {
    return (bits.words[element / 2] >> (element % 2 * 16) & 0xffffu) >= threshold;
  }
  // One pair by itself.
  ONLINE_ATTENTION_HD bool keeps(int64_t head, int32_t q_idx, int32_t kv_idx) const {
    return keeps(bits(head, q_idx, call_of(kv_idx)), element_of(kv_idx));
  }
};

}  // namespace online_attention
