// SPDX-License-Identifier: BSD-3-Clause
// Which keys dropout keeps, for one instruction set: bit for bit what core/dropout.h says, several
// calls at once. (E44)
#pragma once

#include "cpu/query_tile.h"
#include "cpu/simd.h"

namespace online_attention::cpu {

// Philox 4x32-10, one call in each 64-bit lane. Between rounds only the lower halves count.
template <class Isa>
class DropoutBits {
 public:
  static constexpr int kGroupKeys = 32;  // those of kGroupCalls calls, whose words hold their bits
  static constexpr int kGroupCalls = 4;

  // The 16 bits of each key, for whole groups of keys from `first_key` on, a multiple of
  // kGroupKeys. A call's word w holds two neighbours of the keys 8 w to 8 w + 7 of its group, so
  // that the words w of the four calls, side by side, are the bits in the order of the keys.
  static void generate(const DropoutState& state, uint32_t head, uint32_t q_idx, int32_t first_key,
                       int groups, uint16_t* bits) {
    const int32_t first_call = first_key / kGroupKeys * kGroupCalls;
    for (int call = 0; call < groups * kGroupCalls; call += kLanes) {
      Wide words[4] = {iota(Lanes{}) + static_cast<uint32_t>(first_call + call), splat(q_idx),
                       splat(head), splat(state.last_word)};
      scramble(words, state.key);
      for (int i = 0; i < kLanes && call + i < groups * kGroupCalls; i += kTogether) {
        store(words, i,
              bits + (call + i) / kGroupCalls * kGroupKeys + (call + i) % kGroupCalls * 2);
      }
    }
  }

  // Those of the groups that hold `keys`, counted from first_key: bits[key] is that of a key.
  static void generate(const DropoutState& state, uint32_t head, uint32_t q_idx, int32_t first_key,
                       KvRange keys, uint16_t* bits) {
    const int32_t begin = keys.begin / kGroupKeys * kGroupKeys;
    const int groups = (keys.end - begin + kGroupKeys - 1) / kGroupKeys;
    generate(state, head, q_idx, first_key + begin, groups, bits + begin);
  }

 private:
  static constexpr int kLanes = Isa::kVectorBytes / 8;
  static constexpr int kTogether = kLanes < kGroupCalls ? kLanes : kGroupCalls;
  using Wide = typename VectorOf<uint64_t, Isa::kVectorBytes>::type;
  using Narrow = typename VectorOf<uint32_t, Isa::kVectorBytes / 2>::type;
  using Lanes = std::make_integer_sequence<int, kLanes>;

  static Wide splat(uint32_t x) { return Wide{} + x; }
  template <int... kLane>
  static Wide iota(std::integer_sequence<int, kLane...>) {
    return Wide{kLane...};
  }

  static void scramble(Wide (&c)[4], uint64_t key) {
    auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const Wide a = Isa::multiply_words(c[0], splat(0xD2511F53u));
      const Wide b = Isa::multiply_words(c[2], splat(0xCD9E8D57u));
      c[0] = b >> 32 ^ c[1] ^ splat(k0);
      c[1] = b;
      c[2] = a >> 32 ^ c[3] ^ splat(k1);
      c[3] = a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // The words of kTogether calls from lane `first` on.
  static void store(const Wide (&words)[4], int first, uint16_t* bits) {
    for (int w = 0; w < 4; ++w) {
      const auto narrow = __builtin_convertvector(words[w], Narrow);
      __builtin_memcpy(bits + w * 8, (const char*)&narrow + first * 4, kTogether * 4);
    }
  }
};

// x where the bits of its kLanes keys are not below the threshold, 0 where they are.
template <class Lanes>
typename Lanes::Vec kept(typename Lanes::Vec x, const uint16_t* bits, int32_t threshold) {
  using Halves = typename VectorOf<uint16_t, Lanes::kLanes * 2>::type;
  Halves halves;
  __builtin_memcpy(&halves, bits, sizeof halves);
  const auto words =
      __builtin_convertvector(halves, typename VectorOf<uint32_t, Lanes::kLanes * 4>::type);
  const auto drawn = __builtin_convertvector(words, typename Lanes::Bits);
  return drawn >= Lanes::splat_bits(threshold) ? x : typename Lanes::Vec{};
}

// The weights p of `row` become 0 where they are dropped, for `keys` of a tile of kTileKeys from
// first_key on; the row's sum has taken them in. (E45)
template <class Isa, class Lanes, int kTileKeys, class Weight>
void drop_weights(Weight* p, KvRange keys, int32_t first_key, const QueryTile& tile, int row) {
  using Random = DropoutBits<Isa>;
  static_assert(kTileKeys % Random::kGroupKeys == 0);
  uint16_t bits[kTileKeys];
  Random::generate(tile.dropout, tile.head[row], tile.q_idx[row], first_key, keys, bits);
  for (int n = keys.begin; n < keys.end; n += Lanes::kLanes) {
    Lanes::store(kept<Lanes>(Lanes::load(p + n), bits + n, tile.dropout.threshold), p + n);
  }
}

}  // namespace online_attention::cpu
