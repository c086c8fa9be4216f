// SPDX-License-Identifier: BSD-3-Clause
// Tile constants of the SIMT backward kernels, how threads share the tiles, and the products.
#pragma once

#include "cuda/arithmetic.cuh"
#include "cuda/portable/simt_pairs.cuh"
#include "cuda/portable/simt_slice.cuh"
#include "cuda/ptx/special.cuh"

namespace online_attention::cuda::portable {

// For an accumulator type and the columns of D and D_v that one block adds up.
template <typename Real, int kColumnsOfBlock>
struct SimtBackwardConfig {
  static constexpr bool kWide = sizeof(Real) == 8;
  static constexpr int kThreads = 128;
  static constexpr int kVector = 16 / sizeof(Real);  // elements of one shared-memory access
  static constexpr int kColumns = kColumnsOfBlock;
  static constexpr int kTileM = kWide ? 32 : 8192 / kColumns;
  static constexpr int kTileN = kWide ? 32 : 64;
  // Scores: thread (y, x) holds rows y + kScoresY * i and keys x + kScoresX * j.
  static constexpr int kRows = kWide ? 4 : 8;
  static constexpr int kScoresY = kTileM / kRows, kScoresX = kThreads / kScoresY;
  static constexpr int kScores = kTileN / kScoresX;
  // dQ: the same rows, and columns in vectors, kScoresX of them side by side.
  static constexpr int kQueryOuts = kColumns / kScoresX;
  // dK and dV: keys and columns in vectors, kKeysY and kKeysX of them side by side.
  static constexpr int kKeysY = 8, kKeysX = kThreads / kKeysY;
  static constexpr int kKeys = kTileN / kKeysY, kKeyOuts = kColumns / kKeysX;
  // Slices: columns of a pair of row tiles; rows of one tile for dK and dV, or for dQ.
  static constexpr int kSliceD = kWide ? 8 : 2048 / kTileM;
  static constexpr int kSliceRows = kWide ? 16 : 32;
  // Rows are one vector longer than their content, so that a column of vectors meets all banks.
  static constexpr int kPitchD = kSliceD + kVector;
  // Two where they fit: then four rows of scalars meet all banks, too.
  static constexpr int kPitchP = kTileN + (kTileM == 64 ? 2 : 1) * kVector;
  // What is free at the end of each row of P holds the row's lse and delta.
  static constexpr int kLseColumn = kTileN, kDeltaColumn = kTileN + 1;
  static constexpr int kPairElements = (kTileM + kTileN) * kPitchD;
  static constexpr int kRowsElements = kSliceRows * kColumns;
  static constexpr int kSliceElements =
      kPairElements > kRowsElements ? kPairElements : kRowsElements;
  static constexpr int kSmemBytes =
      (2 * kSliceElements + kTileM * kPitchP) * static_cast<int>(sizeof(Real));
  static_assert(kTileM % kSliceRows == 0 && kTileN % kSliceRows == 0);
  static_assert(kQueryOuts % kVector == 0 && kKeys % kVector == 0 && kKeyOuts % kVector == 0);
  static_assert(kSmemBytes <= 64 * 1024);  // Turing
};

// Iterations of the inner loops taken together, as many as there are registers for: Turing copies
// to shared memory through registers, and for Ampere the compiler needs more of them than for
// Hopper. kUnrollDq: in the key kernel of calls with a bias or dropout.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr int kUnroll = 1, kUnrollTransposed = 1, kUnrollDq = 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kUnroll = 2, kUnrollTransposed = 1, kUnrollDq = 1;
#else
inline constexpr int kUnroll = 2, kUnrollTransposed = 2, kUnrollDq = 2;
#endif

// A thread's place in a kY x kX grid of which each warp covers 4 x 8. Lanes that differ in bit 0
// share x and lanes that differ in bit 1 share y: so paired, the two quarters of a half-warp read
// shared memory in 16-byte pieces at once, where otherwise each takes a cycle of its own.
template <int kY, int kX>
struct GridPlace {
  int y, x;
  __device__ __forceinline__ GridPlace() {
    static_assert(kY % 4 == 0 && kX % 8 == 0);
    const uint32_t thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
    y = static_cast<int>(warp / (kX / 8) * 4 + (lane & 1) + (lane >> 4) * 2);
    x = static_cast<int>(warp % (kX / 8) * 8 + (lane >> 1 & 7));
  }
};

// (E25) The probabilities of a row, from its lse alone. L log2(e) is kept in two numbers: its
// rounding would be an error of every probability of the row.
template <typename Real>
struct RowOfLse {
  Real scale, base, rest;

  __device__ __forceinline__ RowOfLse(Real lse, Real scale) : scale(scale) {
    constexpr double kLog2eRest =
        sizeof(Real) == 4 ? kLog2e - double{float(kLog2e)} : 2.0355273740931033e-17;
    const bool empty = lse == -kInfinity<Real>;  // weighs every finite score 0
    base = empty ? kInfinity<Real> : rounded_product(lse, Real(kLog2e));
    rest = empty ? Real(0) : fma(lse, Real(kLog2e), -base) + lse * Real(kLog2eRest);
  }

  // For an lse so large that it is rounded by a whole unit: what is within its rounding of it
  // counts as the maximum. The scores become exponents, which weight() then takes as they are.
  template <int kScores>
  __device__ __forceinline__ void round_alike(Real (&scores)[kScores]) {
    if (!is_large()) return;
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      scores[j] = near_zero(rounded_product(scores[j], scale) - base);
    }
    scale = 1, base = 0, rest = 0;
  }
  __device__ __forceinline__ bool is_large() const {
    return fabs(base) > kFusedUpTo<Real> && !isinf(base);
  }
  __device__ __forceinline__ Real near_zero(Real exponent) const {
    return exponent > -fabs(base) * (4 / kFusedUpTo<Real>) ? Real(0) : exponent;
  }

  // 2^(x * scale - L log2(e)), at most 1 whatever the rounding.
  __device__ __forceinline__ Real weight(Real x) const {
    const Real exponent = (x * scale - base) - rest;
    return exp2_of(exponent > 0 ? Real(0) : exponent);
  }
  // The same for x * scale plus a bias in natural units, in place of round_alike; 0 for a bias of
  // -inf, whatever x is.
  __device__ __forceinline__ Real weight(Real x, Real bias) const {
    const Real exponent = is_large() ? near_zero(fma(x, scale, bias_log2(bias)) - base)
                                     : fma(bias, Real(kLog2e), fma(x, scale, -base)) - rest;
    const Real seen = bias == -kInfinity<Real> ? -kInfinity<Real> : exponent;
    return exp2_of(seen > 0 ? Real(0) : seen);
  }
};

// sum += A B^T over one slice of columns: rows of A from `a` on, of B from `b` on.
template <typename Config, typename Real>
__device__ __forceinline__ void multiply_rows(Real (&sum)[Config::kRows][Config::kScores],
                                              const Real* a, const Real* b) {
  constexpr int kVector = Config::kVector;
#pragma unroll kUnroll
  for (int d = 0; d < Config::kSliceD; d += kVector) {
    Vector<Real> a_part[Config::kRows];
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      a_part[i] = vector_at(a + i * Config::kScoresY * Config::kPitchD + d);
    }
#pragma unroll
    for (int j = 0; j < Config::kScores; ++j) {
      const auto b_part = vector_at(b + j * Config::kScoresX * Config::kPitchD + d);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
#pragma unroll
        for (int i = 0; i < Config::kRows; ++i) sum[i][j] += a_part[i].e[e] * b_part.e[e];
      }
    }
  }
}

// sum += W^T X over the kSliceRows rows of a slice X; `w` are the weights of its first row. With
// kExact, terms of weight 0 are left out: for X with Inf or NaN, where 0 * X is not 0. With kDrops,
// negative weights count as 0, but are not left out.
template <typename Config, bool kExact, bool kDrops, typename Real>
__device__ __forceinline__ void multiply_transposed(Real (&sum)[Config::kKeys][Config::kKeyOuts],
                                                    const Real* w, const Real* x) {
  constexpr int kVector = Config::kVector;
  constexpr int kUnrolled =
      (kDrops ? 1 : kUnrollTransposed) * 128 / Config::kKeyOuts / Config::kKeys;
#pragma unroll(kExact ? 1 : kUnrolled)
  for (int m = 0; m < Config::kSliceRows; ++m) {
    Vector<Real> weights[Config::kKeys / kVector];
    Vector<Real> values[Config::kKeyOuts / kVector];
#pragma unroll
    for (int g = 0; g < Config::kKeys / kVector; ++g) {
      weights[g] = vector_at(w + m * Config::kPitchP + g * Config::kKeysY * kVector);
    }
#pragma unroll
    for (int g = 0; g < Config::kKeyOuts / kVector; ++g) {
      values[g] = vector_at(x + m * Config::kColumns + g * Config::kKeysX * kVector);
    }
#pragma unroll
    for (int n = 0; n < Config::kKeys; ++n) {
      Real weight = weights[n / kVector].e[n % kVector];
      if (kExact && weight == 0) continue;
      if (kDrops && weight < 0) weight = 0;
#pragma unroll
      for (int c = 0; c < Config::kKeyOuts; ++c) {
        sum[n][c] += weight * values[c / kVector].e[c % kVector];
      }
    }
  }
}

// As load_slice, for rows that are readable in 16-byte pieces and need no conversion: one address,
// and one step from each row of a thread to its next.
template <typename Config, int kRows, int kWidth, int kPitch, typename Real>
__device__ __forceinline__ void load_aligned(Real* target, const RowSource<Real>& from,
                                             int32_t first, int32_t column) {
  constexpr int kAcross = kWidth / Config::kVector, kPass = Config::kThreads / kAcross;
  static_assert(kRows % kPass == 0);
  const uint32_t thread = ptx::thread_index();
  const auto row = static_cast<int32_t>(thread / kAcross);
  const auto x = static_cast<int32_t>(thread % kAcross * Config::kVector);
  const uint32_t to = ptx::shared_address(target) + (row * kPitch + x) * sizeof(Real);
  const Real* source = from.data + static_cast<uint32_t>(first + row) * from.stride +
                       static_cast<uint32_t>(column + x);
  const int32_t existing = column + x < from.length ? from.rows - first - row : 0;
#pragma unroll(kUnroll == 1 ? 1 : kRows / kPass)
  for (int r = 0; r < kRows; r += kPass) {
    ptx::cp_async<16>(to + r * kPitch * sizeof(Real), source, r < existing);
    source += kPass * from.stride;
  }
}

// What one instruction reads of the weights for dQ: half a vector, which saves registers.
template <typename Real>
struct alignas(8) HalfVector {
  Real e[8 / sizeof(Real)];
};

// sum += W X over the kSliceRows rows of a slice X; `w` are the weights of its first row.
template <typename Config, bool kExact, int kUnrolled = kUnroll, typename Real>
__device__ __forceinline__ void multiply_plain(Real (&sum)[Config::kRows][Config::kQueryOuts],
                                               const Real* w, const Real* x) {
  constexpr int kVector = Config::kVector, kHalf = kVector / 2;
#pragma unroll(kExact ? 1 : kUnrolled)
  for (int n = 0; n < Config::kSliceRows; n += kHalf) {
    HalfVector<Real> weights[Config::kRows];
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      weights[i] = *reinterpret_cast<const HalfVector<Real>*>(
          w + i * Config::kScoresY * Config::kPitchP + n);
    }
#pragma unroll
    for (int e = 0; e < kHalf; ++e) {
#pragma unroll
      for (int c = 0; c < Config::kQueryOuts; c += kVector) {
        const auto values = vector_at(x + (n + e) * Config::kColumns + c * Config::kScoresX);
#pragma unroll
        for (int i = 0; i < Config::kRows; ++i) {
          if (kExact && weights[i].e[e] == 0) continue;
#pragma unroll
          for (int v = 0; v < kVector; ++v) sum[i][c + v] += weights[i].e[e] * values.e[v];
        }
      }
    }
  }
}

}  // namespace online_attention::cuda::portable
