// SPDX-License-Identifier: BSD-3-Clause
// Forward attention of 16-bit types on tensor cores through mma.sync (FlashAttention-2, section 3).
//
// A block of `warps` warps computes tile_m query rows of one head (or of one group of heads, see
// tile_plan.h) over a range of keys; each warp owns 16 * row_atoms rows from scores to output, so
// rows never cross warps. Shared memory holds Q, one K tile and one V tile. While the block
// multiplies Q K^T, V is on its way; during softmax and P V, the next K is.
#pragma once

#include "cuda/portable/warp_tile.cuh"
#include "cuda/ptx/special.cuh"
#include "cuda/tile_plan.h"

namespace online_attention::cuda::portable {

// A launch. The scale once more, in single precision, so that instructions read it from constant
// memory.
struct TensorCoreCall {
  ForwardArgs args;
  TilePlan plan;
  SplitBuffers<float> partial;
  float sign, scale_log2;
  bool aligned;     // every row of every tensor is readable in 16-byte pieces
  bool bias_pairs;  // and of the bias, if there is one, two keys at a time
};

// `x`, for kv_idx >= 0. What is the same for every key tile, addresses above all, the compiler
// would keep in dozens of registers that scores and outputs need. Tied to the loop variable it is
// computed where it is used, in an instruction or two.
template <typename Int>
__device__ __forceinline__ Int tied(Int x, int32_t kv_idx) {
  return x + static_cast<Int>(kv_idx >> 31);
}

// The block's view of the call: what it reads and which rows it owns.
template <typename Element, ForwardConfig kConfig>
struct BlockContext {
  const TensorCoreCall& call;
  const ForwardArgs& args;
  const TilePlan& plan;
  TileCoord at;
  uint32_t q_smem, k_smem, v_smem;
  int32_t h_kv;

  __device__ __forceinline__ BlockContext(const TensorCoreCall& call, uint32_t index, uint32_t smem)
      : call(call), args(call.args), plan(call.plan), at(plan.locate(index)) {
    constexpr int kRowBytes = kConfig.head_dim * 2;
    q_smem = smem;
    k_smem = q_smem + kConfig.tile_m() * kRowBytes;
    v_smem = k_smem + kConfig.tile_n * kRowBytes;
    h_kv = at.h / plan.group;
  }

  // The keys or values of the block's head. The pointer is computed anew for each tile (see tied).
  __device__ __forceinline__ RowSource<Element> keys_of(const View& view, int64_t length,
                                                        int32_t kv_begin) const {
    return {view.row<const Element>(at.b, tied(h_kv, kv_begin), 0),
            view.stride_s,
            0,
            1,
            static_cast<int32_t>(args.shape.S_kv),
            static_cast<int32_t>(length),
            call.aligned};
  }

  __device__ __forceinline__ int32_t first_row() const { return at.q_tile * kConfig.tile_m(); }
  // Index of a packed row among the B * H * S_q rows of lse.
  __device__ __forceinline__ int64_t output_row(int32_t packed_row) const {
    const int32_t q_idx = plan.query_of(packed_row);
    const int64_t h = at.h + packed_row - q_idx * plan.pack;
    return (at.b * args.shape.H + h) * args.shape.S_q + q_idx;
  }
  // The query and the head of row `row` of the tile; of one that does not exist, the last one's.
  struct QueryRow {
    int32_t b, h, q_idx;
  };
  __device__ __forceinline__ QueryRow query_row(int row, int32_t kv_begin) const {
    const int32_t packed = min(tied(first_row(), kv_begin) + row, plan.rows - 1);
    const int32_t q_idx = plan.query_of(packed);
    return {tied(at.b, kv_begin), tied(at.h, kv_begin) + packed - q_idx * plan.pack, q_idx};
  }
  // Index of the bias of such a row, for key 0.
  __device__ __forceinline__ int64_t bias_row(int row, int32_t kv_begin) const {
    const QueryRow query = query_row(row, kv_begin);
    const Bias& bias = args.bias;
    return query.b * bias.stride_b + query.h * bias.stride_h + query.q_idx * bias.stride_q;
  }
  // Such a row as the generator of dropout counts it: heads among the B * H, by their low 32 bits.
  struct DropoutRow {
    uint32_t head;
    int32_t q_idx;
  };
  __device__ __forceinline__ DropoutRow dropout_row(int row, int32_t kv_begin) const {
    const QueryRow query = query_row(row, kv_begin);
    return {query.b * static_cast<uint32_t>(args.shape.H) + query.h, query.q_idx};
  }
  __device__ __forceinline__ void load_q() const {
    const RowSource<Element> q{args.q.row<const Element>(at.b, at.h, 0),
                               args.q.stride_s,
                               args.q.stride_h,
                               plan.pack,
                               plan.rows,
                               static_cast<int32_t>(args.shape.D),
                               call.aligned};
    load_tile<kConfig.head_dim, kConfig.tile_m(), kConfig.threads()>(q_smem, q, first_row());
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_k(int32_t kv_begin) const {
    load_tile<kConfig.head_dim, kConfig.tile_n, kConfig.threads()>(
        k_smem, keys_of(args.k, args.shape.D, kv_begin), kv_begin);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_v(int32_t kv_begin) const {
    load_tile<kConfig.head_dim, kConfig.tile_n, kConfig.threads()>(
        v_smem, keys_of(args.v, args.shape.D_v, kv_begin), kv_begin);
    ptx::cp_async_commit();
  }
  // Until all this thread's copies, and after the barrier everybody's, are in shared memory.
  __device__ __forceinline__ static void wait_loads() {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // Replaces Inf and NaN in the V tile by zeros and returns whether there were any: where a key is
  // hidden from some rows of the tile only, its value must not reach them as 0 * NaN. All threads.
  __device__ __forceinline__ bool clear_nonfinite_v() const {
    constexpr int kPieces = kConfig.tile_n * kConfig.head_dim * 2 / kChunkBytes;
    bool found = false;
#pragma unroll 1
    for (int piece = threadIdx.x; piece < kPieces; piece += kConfig.threads()) {
      uint32_t words[4];
      const uint32_t address = v_smem + piece * kChunkBytes;
      ptx::load_shared(words, address);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t finite = without_nonfinite<Element>(words[w]);
        if (finite == words[w]) continue;
        found = true;
        ptx::store_shared(address + 4 * w, finite);
      }
    }
    return __syncthreads_or(found) != 0;
  }
  // Whether there are any: cheaper, and in all threads too.
  __device__ __forceinline__ bool has_nonfinite_v() const {
    constexpr int kBytes = kConfig.tile_n * kConfig.head_dim * 2;
    const bool found = has_nonfinite<Element, kBytes, kConfig.threads(), 2>(v_smem);
    return __syncthreads_or(found) != 0;
  }
};

// Writes the warp's rows: through the Q tile, of which each warp reads and writes its own rows
// alone, so that a row leaves in 16-byte pieces.
template <typename Element, ForwardConfig kConfig>
__device__ __forceinline__ void store_rows(const WarpTile<Element, kConfig>& warp,
                                           const BlockContext<Element, kConfig>& block,
                                           bool aligned) {
  using Warp = WarpTile<Element, kConfig>;
  using Tile = SmemTile<kConfig.head_dim>;
  const ForwardArgs& args = block.args;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < Warp::kRows; ++r) {
#pragma unroll
    for (int d = 0; d < Warp::kDimTiles; ++d) {
      const float (&tile)[4] = warp.out[r / 2][d];
      const uint32_t pair = pack_pair<Element>(tile[r % 2 * 2], tile[r % 2 * 2 + 1]);
      const uint32_t address = block.q_smem + Tile::offset(Warp::row(r), d) + Warp::lane() % 4 * 4;
      ptx::store_shared(address, pair);
    }
  }
  if (Warp::lane() % 4 == 0) {
#pragma unroll
    for (int r = 0; r < Warp::kRows; ++r) {
      const int32_t packed = block.first_row() + Warp::row(r);
      if (packed < block.plan.rows) {
        static_cast<float*>(args.lse)[block.output_row(packed)] = warp.softmax[r].lse();  // (E10)
      }
    }
  }
  __syncwarp();
  const auto D_v = static_cast<int>(args.shape.D_v);
  for (int piece = Warp::lane(); piece < 16 * Warp::kAtoms * Tile::kChunks; piece += 32) {
    const int row = Warp::warp_row() + piece / Tile::kChunks;
    const int chunk = piece % Tile::kChunks;
    const int32_t packed = block.first_row() + row;
    const int count = D_v - chunk * kChunkElements;
    if (packed >= block.plan.rows || count <= 0) continue;
    const int32_t q_idx = block.plan.query_of(packed);
    Element* target = args.out.template row<Element>(
                          block.at.b, block.at.h + packed - q_idx * block.plan.pack, q_idx) +
                      chunk * kChunkElements;
    uint32_t words[4];
    ptx::load_shared(words, block.q_smem + Tile::offset(row, chunk));
    store_elements(target, words, count, aligned);
  }
}

// Writes the warp's rows of one split, before normalisation, for combine to merge.
template <typename Element, ForwardConfig kConfig>
__device__ __forceinline__ void store_split(const WarpTile<Element, kConfig>& warp,
                                            const BlockContext<Element, kConfig>& block,
                                            const SplitBuffers<float>& partial) {
  using Warp = WarpTile<Element, kConfig>;
  const Shape& shape = block.args.shape;
#pragma unroll
  for (int r = 0; r < Warp::kRows; ++r) {
    const int32_t packed = block.first_row() + Warp::row(r);
    if (packed >= block.plan.rows) continue;
    const int64_t row = block.output_row(packed);
    const int64_t slot = block.at.split * partial.rows + row;
    if (Warp::lane() % 4 == 0) partial.states[slot] = warp.softmax[r];
    float* target = partial.out + slot * partial.padded_columns(shape) + Warp::lane() % 4 * 2;
#pragma unroll
    for (int d = 0; d < Warp::kDimTiles; ++d) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (d * 8 + Warp::lane() % 4 * 2 + j < shape.D_v) {
          target[d * 8 + j] = warp.out[r / 2][d][r % 2 * 2 + j];
        }
      }
    }
  }
}

// kModified: whether the call may have a bias or dropout.
template <bool kModified, typename Element, ForwardConfig kConfig>
__device__ __forceinline__ void attend(const TensorCoreCall& call, uint32_t smem,
                                       WarpTile<Element, kConfig>& warp) {
  const TilePlan& plan = call.plan;
  const BlockContext<Element, kConfig> block(call, blockIdx.x, smem);
  const Mask& mask = call.args.mask;
  const KvRange keys = plan.keys(mask, block.at);

  using Warp = WarpTile<Element, kConfig>;
  const auto query = [&](int r) { return plan.query_of(block.first_row() + Warp::row(r)); };
  const bool has_bias = kModified && call.args.bias.exists();
  const auto sees = [&](int r, int32_t kv_idx) {
    if (!mask.visible(query(r), kv_idx)) return false;
    if (!has_bias) return true;
    const auto [b, h, q_idx] = block.query_row(Warp::row(r), kv_idx);
    return !hides<Element>(call.args.bias, b, h, q_idx, kv_idx);
  };

  const uint32_t q_base = Warp::q_base(block.q_smem), k_base = Warp::k_base(block.k_smem),
                 v_base = Warp::v_base(block.v_smem);

  block.load_q();
  if (keys.size() > 0) block.load_k(keys.begin);
  block.wait_loads();
  warp.keep_q(block.q_smem);
  for (int32_t kv = keys.begin; kv < keys.end; kv += kConfig.tile_n) {
    block.wait_loads();  // this K is there; V's buffer is free
    block.load_v(kv);
    warp.clear_scores();
    warp.multiply_qk(tied(q_base, kv), tied(k_base, kv));  // S = Q K^T
    block.wait_loads();                                    // this V is there; K's buffer is free
    if (kv + kConfig.tile_n < keys.end) block.load_k(kv + kConfig.tile_n);
    if (call.sign != 1) warp.scale_scores(call.sign);
    bool nonfinite = false;
    if (has_bias) {  // it may hide any pair
      nonfinite = block.has_nonfinite_v();
      if (nonfinite) block.clear_nonfinite_v();
      warp.add_bias(
          call.args.bias, [&](int r) { return block.bias_row(Warp::row(r), kv); }, call.bias_pairs,
          kv, mask.s_kv, call.scale_log2);
    }
    const int32_t q_tile = tied(block.at.q_tile, kv);
    if (mask.tile_needs_mask(plan.query_begin(q_tile), plan.query_end(q_tile), kv,
                             kv + kConfig.tile_n)) {
      warp.hide(mask, query, kv);
      if (mask.is_banded() && !has_bias) nonfinite = block.clear_nonfinite_v();
    }
    warp.update_softmax(has_bias ? 1 : call.scale_log2);  // (E6)-(E8)
    if constexpr (kModified) {
      if (call.args.dropout.exists()) {
        warp.drop(
            call.args.dropout, [&](int r) { return block.dropout_row(Warp::row(r), kv); }, kv);
      }
    }
    warp.multiply_pv(tied(v_base, kv));  // O += P V
    if (nonfinite) {
      warp.add_nonfinite(sees, block.keys_of(call.args.v, call.args.shape.D_v, kv), kv,
                         min(kv + kConfig.tile_n, mask.s_kv));
    }
  }
  warp.complete_sums();
}

// A kernel's own template arguments must be types and integers, hence not a ForwardConfig.
// kModified: for calls with a bias or dropout. Compiled apart, because the plain kernel has no
// register to spare and takes exponentials while P V begins, which a branch between them forbids.
template <typename Element, int kHeadDim, bool kForTuring, bool kModified>
__global__ void __launch_bounds__((config_of<kHeadDim, kForTuring, kModified>().threads()),
                                  (config_of<kHeadDim, kForTuring, kModified>().blocks_per_sm))
    tensor_core_forward_kernel(const __grid_constant__ TensorCoreCall call) {
#if defined(__CUDA_ARCH__)
  if constexpr (kForTuring == (__CUDA_ARCH__ < 800)) {
    extern __shared__ __align__(128) unsigned char smem[];
    constexpr ForwardConfig kConfig = config_of<kHeadDim, kForTuring, kModified>();
    const uint32_t smem_address = ptx::shared_address(smem);
    WarpTile<Element, kConfig> warp;
    attend<kModified>(call, smem_address, warp);
    if (kModified && call.args.dropout.exists()) {
      warp.scale_outputs(call.args.dropout.keep_scale());
    }
    // Located anew: where the block stands takes no registers while the main loop runs.
    const BlockContext<Element, kConfig> block(call, ptx::block_index(), smem_address);
    if (call.plan.splits > 1) {
      store_split(warp, block, call.partial);
    } else {
      warp.normalise();  // (E9)
      store_rows(warp, block, call.aligned);
    }
  }
#endif
}

}  // namespace online_attention::cuda::portable
