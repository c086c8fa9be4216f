// SPDX-License-Identifier: BSD-3-Clause
// The description of one attention call, as every kernel receives it. Plain data: no torch, no
// CUDA. Symbols (B, H, S_q, ...) are those of docs/glossary.md.
#pragma once

#include <cfloat>

#include "core/bias.h"
#include "core/dropout.h"
#include "core/hd.h"
#include "core/mask.h"

namespace online_attention {

enum class DType : int8_t { f16, bf16, f32, f64 };
inline constexpr int kDTypes = 4;

constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
constexpr const char* name_of(DType dtype) {
  constexpr const char* names[kDTypes] = {"float16", "bfloat16", "float32", "float64"};
  return names[static_cast<int>(dtype)];
}

// q [B, H, S_q, D], k [B, H_kv, S_kv, D], v [B, H_kv, S_kv, D_v]; H is a multiple of H_kv.
struct Shape {
  int64_t B = 0, H = 0, H_kv = 0, S_q = 0, S_kv = 0, D = 0, D_v = 0;
  ONLINE_ATTENTION_HD int64_t group() const { return H_kv == 0 ? 1 : H / H_kv; }
  // Nothing to compute: out and lse have no element.
  constexpr bool empty() const { return B == 0 || H == 0 || S_q == 0; }
};

// The largest S_q, S_kv, D and D_v: indices are 32-bit, with room to step past the end by a tile.
inline constexpr int64_t kMaxLength = (int64_t{1} << 31) - 1024;

// A [B, H, S, D] tensor whose last dimension is contiguous. Strides count elements and may be
// anything, zero and negative too.
struct View {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;

  template <typename Element>
  ONLINE_ATTENTION_HD Element* row(int64_t b, int64_t h, int64_t s) const {
    return static_cast<Element*>(data) + b * stride_b + h * stride_h + s * stride_s;
  }
};

// The scale of the scores, split so that kernels may take a row maximum before scaling: a raw
// product is first multiplied by `sign` (+1, -1, or 0), then by `log2` > 0, which includes log2(e).
struct ScoreScale {
  double sign = 1;
  double log2 = 1;
  // `scale` finite. A scale that vanishes in single precision counts as 0 for the types computed
  // in it, so that hidden scores (-inf) are never multiplied by 0; one that overflows it counts as
  // its largest number.
  static ScoreScale from(double scale, DType dtype) {
    const bool wide = dtype == DType::f64;
    const double smallest = wide ? DBL_MIN : double{FLT_MIN};
    const double largest = wide ? DBL_MAX : double{FLT_MAX};
    const double log2 = std::fmin(std::fabs(scale) * kLog2e, largest);
    if (log2 < smallest) return {0, 1};
    return {scale < 0 ? -1.0 : 1.0, log2};
  }
};

struct ForwardArgs {
  DType dtype = DType::f32;
  Shape shape;
  View q, k, v, out;
  void* lse = nullptr;  // [B, H, S_q] contiguous; double for f64, float otherwise; never null
  Mask mask;
  Bias bias;
  Dropout dropout;
  ScoreScale scale;
  // Keys are split by lengths alone, never by how full the device is: no result depends on the
  // batch it is computed in.
  bool batch_invariant = false;

  // Whether more decides on a pair than its indices and its score.
  bool is_modified() const { return bias.exists() || dropout.exists(); }
};

// The gradients of one call, from what its forward returned. (E25)-(E31)
struct BackwardArgs {
  DType dtype = DType::f32;
  Shape shape;
  View q, k, v, out, dout;     // dout [B, H, S_q, D_v], of the dtype and shape of out
  const void* lse = nullptr;   // [B, H, S_q] contiguous, as the forward wrote it
  const void* dlse = nullptr;  // [B, H, S_q] contiguous, of lse's type; nullptr counts as 0
  View dq, dk, dv;             // shaped like q, k, v; data == nullptr: not asked for
  Mask mask;
  Bias bias;
  Dropout dropout;
  ScoreScale scale;
  // scale as it was given, in natural units: (E30) and (E31) multiply by it.
  double factor = 1;
  // Bitwise the same gradients in every run, and none that depends on the batch.
  bool deterministic = false;

  bool is_modified() const { return bias.exists() || dropout.exists(); }  // as ForwardArgs
};

}  // namespace online_attention
