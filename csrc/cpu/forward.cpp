// SPDX-License-Identifier: BSD-3-Clause
// Cuts the problem into query tiles and hands them to the threads, each tile to the kernel of the
// chosen instruction set.
#include "cpu/forward.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "cpu/bias_and_dropout.h"
#include "cpu/instruction_set.h"
#include "cpu/query_tile.h"
#include "cpu/scratch.h"

namespace online_attention {

template struct SoftmaxRow<float>;
template struct SoftmaxRow<double>;
template float exp2_of<float>(float);
template double exp2_of<double>(double);
template float log2_of<float>(float);
template double log2_of<double>(double);
template float max_of<float>(float, float);
template double max_of<double>(double, double);

}  // namespace online_attention

namespace online_attention::cpu {
namespace {

TileKernel tile_kernel(DType dtype) {
#if defined(__x86_64__)
  switch (chosen_instruction_set()) {
    case InstructionSet::amx_bf16:
      return amx_bf16::tile_kernel(dtype);
    case InstructionSet::avx512_bf16:
      return avx512_bf16::tile_kernel(dtype);
    case InstructionSet::avx512:
      return avx512::tile_kernel(dtype);
    case InstructionSet::avx2:
      return avx2::tile_kernel(dtype);
    case InstructionSet::baseline:
      break;
  }
#endif
  return baseline::tile_kernel(dtype);
}

// How the query rows fall into tiles. With few queries a tile takes them from several of the heads
// that share a kv head, so that keys and values are read once for all of these.
struct Tiling {
  int64_t queries, heads;       // of a tile
  int64_t q_tiles, head_tiles;  // of a kv head
  int64_t tiles;
  KeySplit split;  // of the keys of each tile

  // Wide tiles pack keys and values less often; narrow ones keep all cores busy. No result depends
  // on the width.
  explicit Tiling(const Shape& s) : split(s) {
    static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
    const int64_t enough_tasks = 4 * cores;
    int64_t rows = QueryTile::kMaxRows;
    do {
      cut_queries(s.S_q, ceil_div(s.S_q, rows));
      heads = std::clamp<int64_t>(rows / queries, 1, s.group());
      head_tiles = ceil_div(s.group(), heads);
      tiles = s.B * s.H_kv * head_tiles * q_tiles;
      rows /= 2;
    } while (tasks() < enough_tasks && rows >= kFewestRows);
    // So few tasks come out even, if they can.
    for (int64_t fewer = q_tiles; tasks() < enough_tasks && heads == 1 && fewer > 0; --fewer) {
      if (tiles / q_tiles * fewer % cores != 0 || ceil_div(s.S_q, fewer) > kMostQueries) continue;
      tiles /= q_tiles;
      cut_queries(s.S_q, fewer);
      tiles *= q_tiles;
      break;
    }
  }

  int64_t tasks() const { return tiles * split.count; }

 private:
  static constexpr int64_t kBlockRows = 12;  // of the widest kernel, a multiple of the others'
  static constexpr int64_t kFewestRows = 48;
  static constexpr int64_t kMostQueries = QueryTile::kMaxRows - kBlockRows;

  void cut_queries(int64_t S_q, int64_t parts) {
    queries = std::min(S_q, ceil_div(ceil_div(S_q, parts), kBlockRows) * kBlockRows);
    q_tiles = ceil_div(S_q, queries);
  }
};

int64_t real_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Where the parts of the workspace begin, if the keys are split. `memory` may be null: then only
// `bytes` is right.
struct Workspace {
  Workspace(const ForwardArgs& args, const Tiling& tiling, void* memory) {
    if (!tiling.split.exists()) return;
    const Shape& s = args.shape;
    part_bytes = RowPart::bytes(s.D_v, real_bytes(args.dtype));
    parts = static_cast<std::byte*>(memory);
    bytes = s.B * s.H * s.S_q * tiling.split.count * part_bytes;
    if (parts != nullptr) parts_done = reinterpret_cast<Counter*>(parts + bytes);
    bytes += tiling.tiles * static_cast<int64_t>(sizeof(Counter));
  }

  using Counter = std::atomic<int32_t>;
  std::byte* parts = nullptr;     // [B, H, S_q, parts], part_bytes each
  Counter* parts_done = nullptr;  // of each tile
  int64_t part_bytes = 0;
  int64_t bytes = 0;
};

class Forward {
 public:
  Forward(const ForwardArgs& args, void* workspace)
      : args_(args),
        tiling_(args.shape),
        workspace_(args, tiling_, workspace),
        kernel_(tile_kernel(args.dtype)),
        scratch_bytes_(
            static_cast<std::size_t>(kernel_.scratch_bytes(args.shape.D, args.shape.D_v))) {
    for (int64_t tile = 0; tiling_.split.exists() && tile < tiling_.tiles; ++tile) {
      new (workspace_.parts_done + tile) Workspace::Counter(0);
    }
  }

  int64_t tasks() const { return tiling_.tasks(); }

  // Runs on every thread until no task is left: whichever thread is free takes the next one, and
  // the results do not depend on it.
  void work() noexcept {
    thread_local Scratch scratch;
    std::byte* memory = scratch.reserve(scratch_bytes_);
    if (memory == nullptr) {
      out_of_memory_ = true;
      return;
    }
    const InThreadState state(kernel_.thread);
    for (int64_t task; (task = next_task_++) < tasks();) {
      const int64_t index = task / tiling_.split.count;
      const QueryTile tile = query_tile(index, task % tiling_.split.count);
      kernel_.attend(tile, memory);
      if (tile.is_part && is_last_part(index)) join(tile);
    }
  }

  Status status() const {
    return out_of_memory_ && next_task_ < tasks()
               ? "attention on the CPU: no memory is left for a thread's working space."
               : kOk;
  }

 private:
  QueryTile query_tile(int64_t index, int64_t part) const;
  void set_row(QueryTile& tile, int row, int64_t b, int64_t h, int64_t q_idx, int64_t part) const;
  void join(const QueryTile& tile) const;

  bool is_last_part(int64_t tile) const {
    return workspace_.parts_done[tile].fetch_add(1, std::memory_order_acq_rel) + 1 ==
           tiling_.split.count;
  }

  int64_t row_index(int64_t b, int64_t h, int64_t q_idx) const {
    return (b * args_.shape.H + h) * args_.shape.S_q + q_idx;
  }
  std::byte* address(const View& view, int64_t b, int64_t h, int64_t q_idx) const {
    return static_cast<std::byte*>(view.data) +
           (b * view.stride_b + h * view.stride_h + q_idx * view.stride_s) *
               element_bytes(args_.dtype);
  }
  std::byte* lse_address(int64_t row) const {
    return static_cast<std::byte*>(args_.lse) + row * real_bytes(args_.dtype);
  }
  std::byte* part_address(int64_t row, int64_t part) const {
    return workspace_.parts + (row * tiling_.split.count + part) * workspace_.part_bytes;
  }

  const ForwardArgs& args_;
  const Tiling tiling_;
  const Workspace workspace_;
  const TileKernel kernel_;
  const std::size_t scratch_bytes_;
  std::atomic<int64_t> next_task_ = 0;
  std::atomic<bool> out_of_memory_ = false;
};

QueryTile Forward::query_tile(int64_t index, int64_t part) const {
  const Shape& s = args_.shape;
  // Last queries first: under a causal mask they see the most keys, and long tasks at the end would
  // leave threads idle.
  const int64_t q_tile = tiling_.q_tiles - 1 - index % tiling_.q_tiles;
  const int64_t head_tile = index / tiling_.q_tiles % tiling_.head_tiles;
  const int64_t kv_head = index / tiling_.q_tiles / tiling_.head_tiles % s.H_kv;
  const int64_t b = index / tiling_.q_tiles / tiling_.head_tiles / s.H_kv;
  const int64_t q_begin = q_tile * tiling_.queries;
  const int64_t q_end = std::min(q_begin + tiling_.queries, s.S_q);
  const int64_t h_begin = kv_head * s.group() + head_tile * tiling_.heads;
  const int64_t h_end = std::min(h_begin + tiling_.heads, (kv_head + 1) * s.group());

  QueryTile tile;
  tile.is_part = tiling_.split.exists();
  for (int64_t h = h_begin; h < h_end; ++h) {
    for (int64_t q_idx = q_begin; q_idx < q_end; ++q_idx) {
      set_row(tile, tile.rows++, b, h, q_idx, part);
    }
  }
  const auto first = static_cast<int32_t>(q_begin), last = static_cast<int32_t>(q_end);
  const KvRange of_mask = tiling_.split.part_of(args_.mask.kv_range(first, last), part);
  tile.in_place = QueryTile::multiplied_in_place(s);
  tile.in_lanes = QueryTile::multiplied_in_lanes(s, args_.dtype);
  tile.all_rows_see = of_mask;
  tile.some_row_sees = {of_mask.end, of_mask.begin};
  for (int row = 0; row < tile.rows; ++row) {
    const KvRange visible = tile.visible[row];
    tile.all_rows_see.begin = std::max(tile.all_rows_see.begin, visible.begin);
    tile.all_rows_see.end = std::min(tile.all_rows_see.end, visible.end);
    if (visible.size() == 0) continue;
    tile.some_row_sees.begin = std::min(tile.some_row_sees.begin, visible.begin);
    tile.some_row_sees.end = std::max(tile.some_row_sees.end, visible.end);
  }
  if (tile.some_row_sees.size() == 0) tile.some_row_sees = {};
  tile.k = address(args_.k, b, kv_head, 0);
  tile.v = address(args_.v, b, kv_head, 0);
  tile.k_stride = args_.k.stride_s;
  tile.v_stride = args_.v.stride_s;
  tile.D = s.D;
  tile.D_v = s.D_v;
  tile.sign = args_.scale.sign;
  tile.scale_log2 = args_.scale.log2;
  tile.bias_type = args_.bias.type;
  tile.bias_stride = args_.bias.stride_kv;
  tile.dropout = dropout_state(args_.dropout);
  return tile;
}

void Forward::set_row(QueryTile& tile, int row, int64_t b, int64_t h, int64_t q_idx,
                      int64_t part) const {
  const int64_t index = row_index(b, h, q_idx);
  std::byte* const memory = part_address(index, part);
  tile.q[row] = address(args_.q, b, h, q_idx);
  tile.out[row] = tile.is_part ? memory + RowPart::kOutput : address(args_.out, b, h, q_idx);
  tile.lse[row] = tile.is_part ? memory : lse_address(index);
  const auto q = static_cast<int32_t>(q_idx);
  tile.visible[row] = tiling_.split.part_of(args_.mask.kv_range(q, q + 1), part);
  tile.head[row] = static_cast<uint32_t>(b * args_.shape.H + h);
  tile.q_idx[row] = static_cast<uint32_t>(q_idx);
  if (!args_.bias.exists()) return;
  tile.bias[row] = bias_row(args_.bias, args_.dtype, b, h, q_idx);
  tile.visible[row] = without_hidden_ends(args_.bias, tile.bias[row], tile.visible[row]);
}

void Forward::join(const QueryTile& tile) const {
  const Shape& s = args_.shape;
  for (int row = 0; row < tile.rows; ++row) {
    const int64_t b = tile.head[row] / s.H, h = tile.head[row] % s.H, q_idx = tile.q_idx[row];
    const int64_t index = row_index(b, h, q_idx);
    kernel_.join({part_address(index, 0), workspace_.part_bytes, tiling_.split.count, s.D_v,
                  tile.dropout.keep_scale, address(args_.out, b, h, q_idx), lse_address(index)});
  }
}

}  // namespace

int64_t forward_workspace_bytes(const ForwardArgs& args, const Device&) {
  return args.shape.empty() ? 0 : Workspace(args, Tiling(args.shape), nullptr).bytes;
}

Status forward(const ForwardArgs& args, const Launch& launch) {
  if (args.shape.empty()) return kOk;
  Forward forward(args, launch.workspace);
  const auto work = [](int64_t, int64_t, void* context) { static_cast<Forward*>(context)->work(); };
  launch.parallel_for(forward.tasks(), 1, work, &forward);
  return forward.status();
}

}  // namespace online_attention::cpu
