// SPDX-License-Identifier: BSD-3-Clause
// The tile constants of the SIMT kernel, and the slices of Q, K and V that it works from.
#pragma once

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/row_source.cuh"

namespace online_attention::cuda::portable {

template <typename Element>
struct SimtTraits {
  using Real = float;
};
template <>
struct SimtTraits<double> {
  using Real = double;
};

// Tile constants for an accumulator type, the output columns of a block and the keys of a tile.
template <typename Real, int kOutColumns, int kKeys>
struct SimtConfig {
  static constexpr int kThreadsX = 16, kThreadsY = 8;
  static constexpr int kThreads = kThreadsX * kThreadsY;
  static constexpr int kVector = 16 / sizeof(Real);  // elements of one shared-memory access
  static constexpr int kTileM = 64;
  static constexpr int kTileN = kKeys;
  static constexpr int kSliceD = 64 / sizeof(Real);  // columns of Q and K in one slice
  static constexpr int kSliceN = 16;                 // keys of V in one slice
  static constexpr int kColumns = kOutColumns;
  static constexpr int kRows = kTileM / kThreadsY;    // per thread
  static constexpr int kScores = kTileN / kThreadsX;  // per thread and row
  static constexpr int kOuts = kColumns / kThreadsX;  // per thread and row
  // Two short sums round less than one long one. Small tiles have the registers to sum each slice
  // of D on its own; those and narrow outputs have them to sum each key tile of P V on its own.
  static constexpr bool kSumsSlices = kTileN <= 64;
  static constexpr bool kSumsTiles = kSumsSlices || kColumns <= 64;
  // Rows are one vector longer than their content, so that a column of vectors meets all banks.
  static constexpr int kPitchD = kSliceD + kVector;
  static constexpr int kPitchP = kTileN + kVector;
  static constexpr int kSliceElements = (kTileM + kTileN) * kPitchD > kSliceN* kColumns
                                            ? (kTileM + kTileN) * kPitchD
                                            : kSliceN * kColumns;
  static constexpr int kSmemBytes =
      (2 * kSliceElements + kTileM * kPitchP) * static_cast<int>(sizeof(Real));
  static_assert(kOuts % kVector == 0 && kTileN % kSliceN == 0);
  static_assert(kSmemBytes <= 64 * 1024);  // Turing
};

// What one instruction reads from shared memory.
template <typename Real>
struct alignas(16) Vector {
  Real e[16 / sizeof(Real)];
};
template <typename Real>
__device__ __forceinline__ Vector<Real> vector_at(const Real* address) {
  return *reinterpret_cast<const Vector<Real>*>(address);
}

// Rows [first, first + kRows) of columns [column, column + kWidth) into shared memory with a pitch,
// as Real; zeros where the source has no row or column. Asynchronous where no conversion is needed.
template <typename Config, int kRows, int kWidth, int kPitch, typename Element, typename Real>
__device__ __forceinline__ void load_slice(Real* target, const RowSource<Element>& from,
                                           int32_t first, int32_t column) {
  constexpr bool kConverts = sizeof(Element) != sizeof(Real);
  const uint32_t base = ptx::shared_address(target);
  if (!kConverts && from.aligned) {
    constexpr int kAcross = kWidth / Config::kVector, kPass = Config::kThreads / kAcross;
    static_assert(kRows % kPass == 0);
    const int row = threadIdx.x / kAcross, x = threadIdx.x % kAcross * Config::kVector;
#pragma unroll
    for (int r = row; r < row + kRows; r += kPass) {
      const bool exists = first + r < from.rows && column + x < from.length;
      ptx::cp_async<16>(base + (r * kPitch + x) * sizeof(Real), from.row(first + r) + column + x,
                        exists);
    }
    return;
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kWidth; i += Config::kThreads) {
    const int row = i / kWidth, x = i % kWidth;
    const bool exists = first + row < from.rows && column + x < from.length;
    const Element* source = from.row(first + row) + column + x;
    if constexpr (kConverts) {
      target[row * kPitch + x] = exists ? static_cast<Real>(*source) : Real(0);
    } else {
      ptx::cp_async<sizeof(Real)>(base + (row * kPitch + x) * sizeof(Real), source, exists);
    }
  }
}

}  // namespace online_attention::cuda::portable
