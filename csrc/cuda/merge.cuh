// SPDX-License-Identifier: BSD-3-Clause
// What merging and its gradients share: who works on which row, and where the parts are found.
//
// A group of 1, 2, 4, .. 32 neighbouring lanes works on one row, each lane on every so many-th
// chunk of kVector columns: as few lanes as cover the row, so that small head dims leave none idle.
// Every lane computes the weights of the whole row by itself. Memory bounds it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/merge.h"
#include "cuda/launch.cuh"

namespace online_attention::cuda {

inline constexpr int kMergeThreads = 128;

// Row numbers have 32 bits: divisions of 64 bits are subroutines, around which registers are
// spilled.
inline constexpr int64_t kMaxRows = int64_t{1} << 31;

// As many parts travel in a kernel's parameters, which any driver takes up to 4 KB.
inline constexpr int kMaxPartsHere = 48;

struct PartsHere {
  MergePart parts[kMaxPartsHere];
  __device__ __forceinline__ const MergePart& operator[](int r) const { return parts[r]; }
};
static_assert(sizeof(PartsHere) + sizeof(MergeBackwardArgs) + 64 <= 4096);

// More are written into the workspace first.
struct PartsInMemory {
  const MergePart* parts;
  __device__ __forceinline__ const MergePart& operator[](int r) const { return parts[r]; }
};

// kVector neighbouring columns, loaded and stored at once.
template <typename Element, int kVector>
struct alignas(kVector * sizeof(Element)) Chunk {
  Element values[kVector];

  __device__ __forceinline__ static Chunk load(const Element* from) {
    return *reinterpret_cast<const Chunk*>(from);
  }
  __device__ __forceinline__ void store(Element* to) const {
    *reinterpret_cast<Chunk*>(to) = *this;
  }
};

// The row and the lane of a thread.
struct RowLane {
  uint32_t row;
  int lane, lanes;  // of the row's group
  uint32_t b = 0, h = 0, s = 0;

  __device__ __forceinline__ explicit RowLane(int lanes_log2)
      : row((uint64_t{blockIdx.x} * kMergeThreads + threadIdx.x) >> lanes_log2),
        lane(threadIdx.x & ((1 << lanes_log2) - 1)),
        lanes(1 << lanes_log2) {}

  // Finds b, h and s of a row that exists.
  __device__ __forceinline__ void locate(const MergeShape& shape) {
    const auto S_q = static_cast<uint32_t>(shape.S_q), H = static_cast<uint32_t>(shape.H);
    const uint32_t head = row / S_q;
    b = head / H, h = head % H, s = row % S_q;
  }

  template <typename T>
  __device__ __forceinline__ T* in(const View& view) const {
    return view.row<T>(b, h, s);
  }

  // The sum of x over the group: the same bits in each of its lanes, all of which must call.
  template <typename Real>
  __device__ __forceinline__ Real sum(Real x) const {
    const uint32_t first = threadIdx.x % 32 - lane;
    const uint32_t group = (lanes == 32 ? ~0u : (1u << lanes) - 1) << first;
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      x += __shfl_xor_sync(group, x, distance);
    }
    return x;
  }
};

template <typename Real, typename Parts>
__device__ __forceinline__ MergedRow<Real> weigh(const Parts& parts, int count, const RowLane& at) {
  MergedRow<Real> row;
  for (int r = 0; r < count; ++r) row.show(*at.in<const Real>(parts[r].lse));
  row.begin();
  for (int r = 0; r < count; ++r) row.absorb(*at.in<const Real>(parts[r].lse));
  row.end();
  return row;
}

// --- on the host

static __global__ void store_parts(const __grid_constant__ PartsHere parts, int count,
                                   MergePart* to) {
  if (threadIdx.x < count) to[threadIdx.x] = parts[threadIdx.x];
}

template <typename Args>
int64_t merge_workspace_bytes_of(const Args& args) {
  return args.count <= kMaxPartsHere ? 0 : args.count * static_cast<int64_t>(sizeof(MergePart));
}

// Whether all outs, and the other views given, are readable in chunks of 16 bytes.
template <typename Args>
bool takes_chunks(const Args& args, std::initializer_list<const View*> others) {
  const int64_t bytes = element_bytes(args.dtype);
  if (args.shape.D_v * bytes % 16 != 0) return false;
  for (const View* view : others) {
    if (!is_aligned_16(*view, bytes)) return false;
  }
  for (int64_t r = 0; r < args.count; ++r) {
    if (!is_aligned_16(args.parts[r].out, bytes)) return false;
  }
  return true;
}

// Launches one of two kernels on a group of lanes for each row: the first with the parts in its
// parameters, the second with the parts in memory.
template <typename Args>
Status launch_merge(void (*here)(Args, PartsHere, int), void (*in_memory)(Args, PartsInMemory, int),
                    int vector, const Args& args, const Launch& launch_with) {
  if (args.shape.rows() > kMaxRows) return "merge takes up to 2^31 rows a call: split its batch";
  int lanes_log2 = 0;
  while (lanes_log2 < 5 && int64_t{vector} << lanes_log2 < args.shape.D_v) ++lanes_log2;
  constexpr int kRowsLog2 = 7;  // of a block whose rows take one lane each
  static_assert(1 << kRowsLog2 == kMergeThreads);
  const int64_t blocks = ceil_div(args.shape.rows(), int64_t{1} << (kRowsLog2 - lanes_log2));
  void* const stream = launch_with.stream;
  const auto chunk_of = [&](int64_t first) {
    PartsHere chunk = {};
    for (int64_t r = first; r < args.count && r < first + kMaxPartsHere; ++r) {
      chunk.parts[r - first] = args.parts[r];
    }
    return chunk;
  };
  if (args.count <= kMaxPartsHere) {
    return launch(here, blocks, kMergeThreads, 0, stream, args, chunk_of(0), lanes_log2);
  }
  auto* const table = static_cast<MergePart*>(launch_with.workspace);
  for (int64_t first = 0; first < args.count; first += kMaxPartsHere) {
    const auto some =
        static_cast<int>(args.count - first < kMaxPartsHere ? args.count - first : kMaxPartsHere);
    const Status status =
        launch(store_parts, 1, 64, 0, stream, chunk_of(first), some, table + first);
    if (status != kOk) return status;
  }
  return launch(in_memory, blocks, kMergeThreads, 0, stream, args, PartsInMemory{table},
                lanes_log2);
}

}  // namespace online_attention::cuda
