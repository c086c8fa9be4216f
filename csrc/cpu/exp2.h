// SPDX-License-Identifier: BSD-3-Clause
// 2^x of a whole vector, to the last bit or two.
//
// By a polynomial: 2^x = 2^n 2^f with n the nearest integer and |f| <= 1/2, where 2^f = 1 + f P(f).
// P is the Chebyshev fit of (2^f - 1) / f; its relative error is 4e-9 in single and 6e-18 in double
// precision, well below the rounding of the type.
//
// By a table of one register, where one instruction looks up a whole vector of single precision:
// 2^x = 2^n 2^(j / entries) 2^f with j < entries and |f| <= 1 / (2 entries). P is so much shorter:
// 6 instructions of the multiply-add units instead of 9. Its error is below 2e-9.
#pragma once

#include "cpu/simd.h"

namespace online_attention::cpu {

template <class Real>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kBias = 127;
  static constexpr float kRound =
      0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr float kP[] = {0.69314718802622878f,   0.24022650760568127f,
                                 0.055503571142190778f,  0.0096180825572778515f,
                                 0.0013390863364671234f, 0.00015453162945120690f};
};

template <>
struct Exp2Constants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kP[] = {
      0.69314718055994530942,     0.2402265069591009822,    0.055504108664821594339,
      0.0096181291076068885273,   0.001333355814641693531,  0.00015403530441736050155,
      0.000015252733829836118394, 1.3215442587921689653e-6, 1.0178062445845773521e-7,
      7.0725859492692236999e-9,   4.4549605981865183938e-10};
};

template <class Simd, class Real>
typename Simd::Vec exp2_by_polynomial(typename Simd::Vec x) {
  using C = Exp2Constants<Real>;
  using Vec = typename Simd::Vec;
  // NaN loses no lane here: max gives its second argument.
  x = Simd::max(Simd::splat(-C::kBias), x);
  const Vec shifted = x + Simd::splat(C::kRound + C::kBias);
  const Vec f = x - (shifted - Simd::splat(C::kRound + C::kBias));
  constexpr int kDegree = sizeof(C::kP) / sizeof(Real) - 1;
  Vec poly = Simd::splat(C::kP[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) poly = poly * f + Simd::splat(C::kP[i]);
  poly = poly * f + Simd::splat(1);
  // A product, not an addition to the exponent field, so that a NaN cannot turn into a number.
  const auto power_of_two = (typename Simd::Bits)shifted << C::kMantissaBits;
  return poly * (Vec)power_of_two;
}

// `kPowers` holds the bits of 2^(j / entries) less those that the shifted j adds to them.
template <int kEntries>
struct Exp2Table;

template <>
struct Exp2Table<8> {
  static constexpr int kShift = 20;
  static constexpr float kRound = 0x1.8p20f;  // leaves the nearest eighth in the low bits
  static constexpr int32_t kPowers[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                         0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  static constexpr float kP[] = {0.69314718246459961f, 0.24022650718688965f, 0.055510595440864563f,
                                 0.0096176536753773689f};
};

template <>
struct Exp2Table<16> {
  static constexpr int kShift = 19;
  static constexpr float kRound = 0x1.8p19f;
  static constexpr int32_t kPowers[16] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3,
                                          0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                                          0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                          0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  static constexpr float kP[] = {0.69314718246459961f, 0.24023428559303284f, 0.055502135306596756f};
};

template <class Simd>
typename Simd::Vec exp2_by_table(typename Simd::Vec x) {
  using Table = Exp2Table<Simd::kLanes>;
  using Vec = typename Simd::Vec;
  const Vec shifted = x + Simd::splat(Table::kRound);
  const Vec f = x - (shifted - Simd::splat(Table::kRound));
  constexpr int kDegree = sizeof(Table::kP) / sizeof(float) - 1;
  Vec poly = Simd::splat(Table::kP[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) poly = poly * f + Simd::splat(Table::kP[i]);
  using Words = typename Simd::Words;  // unsigned: where x is out of range, they wrap around
  const auto bits = (typename Simd::Bits)shifted;
  const auto powers = (typename Simd::Bits)Simd::load_bits(Table::kPowers);
  const Vec power = (Vec)((Words)Simd::look_up(powers, bits) + ((Words)bits << Table::kShift));
  // NaN is in f, and stays NaN whatever it looks up.
  const Vec result = power * (poly * f) + power;
  return x < Simd::splat(-126) ? Vec{} : result;
}

// For x < kBias. Results below the smallest normal number are 0, and so is 2^-inf; NaN stays NaN.
template <class Simd, class Real>
typename Simd::Vec exp2_of_lanes(typename Simd::Vec x) {
  if constexpr (Simd::kLooksUp) {
    return exp2_by_table<Simd>(x);
  } else {
    return exp2_by_polynomial<Simd, Real>(x);
  }
}
}  // namespace online_attention::cpu
