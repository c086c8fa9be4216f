// SPDX-License-Identifier: BSD-3-Clause
// A [rows, head dim] tile of 16-bit elements in shared memory, in 16-byte chunks whose order within
// a row is permuted so that ldmatrix (8 rows, one chunk each) and row-wise writes both touch all
// banks once.
#pragma once

#include <cstdint>

#include "cuda/fragment.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/row_source.cuh"

namespace online_attention::cuda {

inline constexpr int kChunkElements = 8;  // 16 bytes
inline constexpr int kChunkBytes = 16;

template <int kHeadDim>
struct SmemTile {
  static constexpr int kChunks = kHeadDim / kChunkElements;
  static constexpr int kRowBytes = kHeadDim * 2;
  static_assert(kChunks % 4 == 0);
  // Rows of whole 128-byte lines (8 chunks) are told apart by their low three bits. With half a
  // line over (head dim 96), two rows in turn cover the banks, and the next two bits decide.
  static constexpr uint32_t kKeyMask = kChunks % 8 == 0 ? 7 : 3;

  __device__ __forceinline__ static uint32_t key(uint32_t row) {
    return (kChunks % 8 == 0 ? row : row >> 1) & kKeyMask;
  }
  // Byte offset of a chunk.
  __device__ __forceinline__ static uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + (chunk ^ key(row)) * kChunkBytes;
  }
  // The same in two steps, for one row and many chunks: `offset(row, lane_chunk)` once for each
  // lane, then one XOR for each chunk known at compile time, where lane_chunk < 2 and `chunk` is
  // even. `base` is a tile address (aligned to 128 bytes) plus that offset.
  __device__ __forceinline__ static uint32_t advance(uint32_t base, uint32_t chunk) {
    const uint32_t low = chunk & kKeyMask;
    return (base ^ (low * kChunkBytes)) + (chunk - low) * kChunkBytes;
  }
};

// Writes one chunk from up to 8 elements of any alignment, with zeros behind them.
template <typename Element>
__device__ __forceinline__ void store_chunk(uint32_t target, const Element* source, int count) {
  static_assert(sizeof(Element) == 2);
  uint32_t words[4] = {};
#pragma unroll
  for (int e = 0; e < kChunkElements; ++e) {
    if (e < count) {
      words[e / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(source)[e]} << (16 * (e % 2));
    }
  }
  ptx::store_shared(target, words);
}

// Writes up to 8 elements to global memory, in one piece if `aligned`, which has a count of 8 or
// more.
template <typename Element>
__device__ __forceinline__ void store_elements(Element* target, const uint32_t (&words)[4],
                                               int count, bool aligned) {
  static_assert(sizeof(Element) == 2);
  if (aligned) {
    *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int e = 0; e < kChunkElements; ++e) {
    if (e < count) {
      reinterpret_cast<uint16_t*>(target)[e] =
          static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
    }
  }
}

// Starts the copy of rows [first, first + kRows) into a tile; the caller commits and waits. All
// kThreads threads.
template <int kHeadDim, int kRows, int kThreads, typename Element>
__device__ __forceinline__ void load_tile(uint32_t tile, const RowSource<Element>& from,
                                          int32_t first) {
  using Tile = SmemTile<kHeadDim>;
  const unsigned thread = threadIdx.x;
  if (from.aligned && from.pack == 1) {
    // A few threads side by side copy a row, a whole pass of threads kRowsPerPass rows. The swizzle
    // is the same in every pass, so a thread's addresses differ by constants.
    constexpr int kAcross = Tile::kChunks % 8 == 0 ? 8 : 4;
    constexpr int kRowsPerPass = kThreads / kAcross;
    static_assert(kRowsPerPass % 8 == 0 && kRows % kRowsPerPass == 0);
    const int row = static_cast<int>(thread / kAcross), chunk = static_cast<int>(thread % kAcross);
    const Element* source = from.data + (first + row) * from.stride + chunk * kChunkElements;
    const uint32_t target = tile + Tile::offset(row, chunk);
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const bool row_exists = first + row + pass * kRowsPerPass < from.rows;
#pragma unroll
      for (int c = 0; c < Tile::kChunks; c += kAcross) {
        const bool exists = row_exists && (chunk + c) * kChunkElements < from.length;
        ptx::cp_async<kChunkBytes>(target + pass * kRowsPerPass * Tile::kRowBytes + c * kChunkBytes,
                                   source + c * kChunkElements, exists);
      }
      source += kRowsPerPass * from.stride;
    }
    return;
  }
  // Packed or unaligned rows; not unrolled, to leave the registers to the caller.
#pragma unroll 1
  for (int piece = static_cast<int>(thread); piece < kRows * Tile::kChunks; piece += kThreads) {
    const int row = piece / Tile::kChunks, chunk = piece % Tile::kChunks;
    const int count = from.length - chunk * kChunkElements;
    const bool exists = first + row < from.rows && count > 0;
    const Element* source = exists ? from.row(first + row) + chunk * kChunkElements : from.data;
    const uint32_t target = tile + Tile::offset(row, chunk);
    if (from.aligned) {
      ptx::cp_async<kChunkBytes>(target, source, exists);
    } else {
      store_chunk(target, source, exists ? count : 0);
    }
  }
}

// Whether this thread's share of kBytes of elements holds Inf or NaN. All kThreads threads; kUnroll
// chunks of 16 bytes at a time.
template <typename Element, int kBytes, int kThreads, int kUnroll = kBytes / kThreads / kChunkBytes>
__device__ __forceinline__ bool has_nonfinite(uint32_t address) {
  using Pair = PairOf<Element>;
  Pair sum = zero_pair<Element>();
#pragma unroll kUnroll
  for (int at = 0; at < kBytes; at += kThreads * kChunkBytes) {
    uint32_t words[4];
    ptx::load_shared(words, address + at + threadIdx.x * kChunkBytes);
#pragma unroll
    for (const uint32_t word : words) {
      sum = __hfma2(reinterpret_cast<const Pair&>(word), zero_pair<Element>(), sum);
    }
  }
  return !__hbeq2(sum, sum);  // Inf * 0 and NaN * 0 are NaN
}

// Writes a tile to rows [first, first + kRows) in 16-byte pieces. All kThreads threads.
template <int kHeadDim, int kRows, int kThreads, typename Element>
__device__ __forceinline__ void store_tile(uint32_t tile, const RowTarget<Element>& to,
                                           int32_t first) {
  using Tile = SmemTile<kHeadDim>;
#pragma unroll 4
  for (int piece = static_cast<int>(threadIdx.x); piece < kRows * Tile::kChunks;
       piece += kThreads) {
    const int row = piece / Tile::kChunks, chunk = piece % Tile::kChunks;
    const int count = to.length - chunk * kChunkElements;
    if (first + row >= to.rows || count <= 0) continue;
    Element* target = to.data + (first + row) * to.stride + chunk * kChunkElements;
    uint32_t words[4];
    ptx::load_shared(words, tile + Tile::offset(row, chunk));
    store_elements(target, words, count, to.aligned);
  }
}

}  // namespace online_attention::cuda
