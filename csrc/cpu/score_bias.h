// SPDX-License-Identifier: BSD-3-Clause
// What becomes of raw scores before they are weighed: the bias is added, and hidden pairs turn into
// -inf. Shared by the passes, which must round scores alike. (E40), (E41)
#pragma once

#include <limits>

#include "core/bias.h"
#include "core/mask.h"
#include "cpu/simd.h"

namespace online_attention::cpu {

template <class Isa, class Element>
class ScoreBias {
 public:
  using Real = RealOf<Element>;
  using Lanes = Simd<Isa, Real>;

  // `stride`: elements between two keys.
  ScoreBias(BiasType type, int64_t stride, double scale_log2)
      : type_(type), stride_(stride), scale_log2_(static_cast<Real>(scale_log2)) {}

  bool exists() const { return type_ != BiasType::none; }

  // What brings scores to base-2 units once `apply` has seen them: where it adds, it also scales.
  Real factor() const {
    return type_ == BiasType::element || type_ == BiasType::f32 ? Real(1) : scale_log2_;
  }

  // `count` scores of one row, whole vectors, from key `first_key` on. Of the keys outside
  // `visible` nothing is read. Never inlined: the compiler could fuse products otherwise from place
  // to place.
  [[gnu::noinline]] void apply(Real* s, int count, const void* row, int32_t first_key,
                               KvRange visible) const {
    const auto each = [&](const auto* elements, auto combine) {
      apply_each(s, count, elements, first_key, visible, combine);
    };
    const auto add = [&](Vec score, const auto* bias) { return sum(score, load(bias)); };
    switch (type_) {
      case BiasType::none:
        return each((const uint8_t*)nullptr, [](Vec score, const uint8_t*) { return score; });
      case BiasType::boolean:
        return each(static_cast<const uint8_t*>(row), [](Vec score, const uint8_t* shown) {
          return widen(shown) == 0 ? Lanes::splat(-kInfinity<Real>) : score;
        });
      case BiasType::element:
        return each(static_cast<const Element*>(row), add);
      case BiasType::f32:
        return each(static_cast<const float*>(row), add);
    }
  }

  // Whether the bias hides one key from the row.
  bool hides(const void* row, int64_t key) const {
    switch (type_) {
      case BiasType::none:
        break;
      case BiasType::boolean:
        return static_cast<const uint8_t*>(row)[key * stride_] == 0;
      case BiasType::element:
        return is_hidden(static_cast<const Element*>(row)[key * stride_]);
      case BiasType::f32:
        return is_hidden(static_cast<const float*>(row)[key * stride_]);
    }
    return false;
  }

  // Whether a boolean bias hides all `keys` from all of `rows`; false where that is not cheap to
  // say. Neighbours that share their bias are asked once.
  bool hides_all(const void* const* rows, int count, KvRange keys) const {
    if (type_ != BiasType::boolean) return false;
    for (int i = 0; i < count; ++i) {
      if (i > 0 && rows[i] == rows[i - 1]) continue;
      if (!hides_all(rows[i], keys)) return false;
    }
    return true;
  }

 private:
  bool hides_all(const void* row, KvRange keys) const {
    const auto* shown = static_cast<const uint8_t*>(row);
    if (stride_ == 0) return *shown == 0;
    if (stride_ != 1) return false;
    uint8_t some = 0;
    for (int32_t key = keys.begin; key < keys.end; ++key) some |= shown[key];
    return some == 0;
  }

  using Vec = typename Lanes::Vec;
  using Bits = typename Lanes::Bits;
  using Integer = typename Lanes::Integer;
  static constexpr int kLanes = Lanes::kLanes;

  // combine(scores, the bias of their keys), for one vector after the other.
  template <class Stored, class Combine>
  void apply_each(Real* s, int count, const Stored* row, int32_t first_key, KvRange visible,
                  Combine combine) const {
    Stored near[kLanes] = {};
    if (row != nullptr && stride_ == 0 && visible.size() > 0) {
      for (Stored& element : near) element = *row;
    }
    const bool gathers = row != nullptr && stride_ != 0;
    const auto begin = Lanes::splat_bits(static_cast<Integer>(visible.begin));
    const auto end = Lanes::splat_bits(static_cast<Integer>(visible.end));
    auto key = Lanes::iota() + Lanes::splat_bits(static_cast<Integer>(first_key));
    for (int n = 0; n < count; n += kLanes, key += Lanes::splat_bits(kLanes)) {
      const int64_t first = int64_t{first_key} + n;
      const bool whole = visible.begin <= first && first + kLanes <= visible.end;
      const Stored* elements = near;
      if (gathers && whole && stride_ == 1) {
        elements = row + first;
      } else if (gathers) {
        for (int i = 0; i < kLanes; ++i) {
          const bool seen = visible.begin <= first + i && first + i < visible.end;
          near[i] = seen ? row[(first + i) * stride_] : Stored{};
        }
      }
      const Vec combined = combine(Lanes::load(s + n), elements);
      const auto hidden = (key < begin) | (key >= end);
      Lanes::store(hidden ? Lanes::splat(-kInfinity<Real>) : combined, s + n);
    }
  }

  // (E41) A finite bias stays finite in base-2 units: rows of nothing but the smallest number weigh
  // all of their keys, as they do in natural units. NaN passes: max gives its second argument.
  Vec sum(Vec score, Vec bias) const {
    const Vec least = Lanes::splat(-std::numeric_limits<Real>::max());
    const Vec bias2 = Lanes::max(least, bias * Lanes::splat(Real(kLog2e)));
    const Vec hidden = Lanes::splat(-kInfinity<Real>);
    return bias == hidden ? hidden : score * Lanes::splat(scale_log2_) + bias2;
  }

  template <class Stored>
  static Vec load(const Stored* from) {
    if constexpr (sizeof(Stored) < sizeof(Real) && sizeof(Stored) == sizeof(float)) {
      typename VectorOf<float, kLanes * 4>::type narrow;
      __builtin_memcpy(&narrow, from, sizeof narrow);
      return __builtin_convertvector(narrow, Vec);
    } else {
      return Lanes::load(from);
    }
  }

  static Bits widen(const uint8_t* from) {
    typename VectorOf<uint8_t, kLanes>::type bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    const auto halves =
        __builtin_convertvector(bytes, typename VectorOf<uint16_t, kLanes * 2>::type);
    const auto words =
        __builtin_convertvector(halves, typename VectorOf<uint32_t, kLanes * 4>::type);
    return __builtin_convertvector(words, Bits);
  }

  static bool is_hidden(F16 bias) { return bias.bits == 0xfc00; }
  static bool is_hidden(Bf16 bias) { return bias.bits == 0xff80; }
  static bool is_hidden(float bias) { return bias == -kInfinity<float>; }
  static bool is_hidden(double bias) { return bias == -kInfinity<double>; }

  const BiasType type_;
  const int64_t stride_;
  const Real scale_log2_;
};

}  // namespace online_attention::cpu
