// SPDX-License-Identifier: BSD-3-Clause
// Any processor of the architecture: SSE2 on x86-64, NEON on aarch64.
// In an unnamed namespace: every file that includes this is compiled for the set, and whatever it
// makes of Isa is its own.
#pragma once

#include "cpu/operand.h"

namespace online_attention::cpu::baseline {
namespace {

// Four lanes of 32 bits.
struct Isa {
  static constexpr int kVectorBytes = 16;
  static constexpr int kBlockRows = 6, kBlockVecs = 2;  // 12 of 16 registers hold sums
  static constexpr bool kRoundsProducts = true;         // before it adds them
  template <class Element>
  using Operand = Widened<Isa, Element>;

  typedef float Floats __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint64_t Wide __attribute__((vector_size(16)));

  // The products of the lower 32 bits of each 64-bit lane.
  static Wide multiply_words(Wide a, Wide b) { return (a & 0xffffffff) * (b & 0xffffffff); }

  static Words widen(const uint16_t* from) { return Words{from[0], from[1], from[2], from[3]}; }
  static void narrow(Words words, uint16_t* to) {
    for (int i = 0; i < 4; ++i) to[i] = static_cast<uint16_t>(words[i]);
  }

  // Adding 112 to the exponent makes a half's 5 exponent bits a float's 8. Infinity and NaN need
  // another 112; below the normal numbers a float subtraction does the normalising.
  static Floats load(const F16* from) {
    const Words half = widen(&from->bits);
    const Words magnitude = (half & 0x7fff) << 13;
    const Words normal = magnitude + (112u << 23);
    const Words special = normal + (112u << 23);
    const Words smallest_normal = Words{} + (113u << 23);
    const Words subnormal =
        (Words)((Floats)(magnitude + smallest_normal) - (Floats)smallest_normal);
    const Words exponent = half & 0x7c00;
    const Words finite = exponent == 0 ? subnormal : normal;
    const Words unsigned_float = exponent == 0x7c00 ? special : finite;
    return (Floats)(unsigned_float | (half & 0x8000) << 16);
  }

  static void store(Floats v, F16* to) {
    const Words sign = (Words)v & 0x80000000;
    const Words magnitude = (Words)v ^ sign;
    const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Adding 1/2 aligns a subnormal half's last bit with a float's; the addition rounds.
    const Words half_one = Words{} + (126u << 23);
    const Words subnormal = (Words)((Floats)magnitude + (Floats)half_one) - half_one;
    const Words finite = magnitude < (113u << 23) ? subnormal : normal;
    const Words number = magnitude >= (143u << 23) ? Words{} + 0x7c00 : finite;
    const Words quiet_nan = Words{} + 0x7e00;
    narrow((magnitude > 0x7f800000 ? quiet_nan : number) | sign >> 16, &to->bits);
  }
};

}  // namespace
}  // namespace online_attention::cpu::baseline
