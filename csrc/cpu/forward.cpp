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
  int64_t tasks;

  // Wide tiles pack keys and values less often; narrow ones keep all cores busy. No result depends
  // on the width.
  explicit Tiling(const Shape& s) {
    static const int64_t enough_tasks = 4 * int64_t{std::thread::hardware_concurrency()};
    int64_t rows = QueryTile::kMaxRows;
    do {
      q_tiles = ceil_div(s.S_q, rows);
      queries = std::min(s.S_q, ceil_div(ceil_div(s.S_q, q_tiles), kBlockRows) * kBlockRows);
      q_tiles = ceil_div(s.S_q, queries);
      heads = std::clamp<int64_t>(rows / queries, 1, s.group());
      head_tiles = ceil_div(s.group(), heads);
      tasks = s.B * s.H_kv * head_tiles * q_tiles;
      rows /= 2;
    } while (tasks < enough_tasks && rows >= kFewestRows);
  }

 private:
  static constexpr int64_t kBlockRows = 12;  // of the widest kernel, a multiple of the others'
  static constexpr int64_t kFewestRows = 48;
};

class Forward {
 public:
  explicit Forward(const ForwardArgs& args)
      : args_(args),
        tiling_(args.shape),
        kernel_(tile_kernel(args.dtype)),
        scratch_bytes_(
            static_cast<std::size_t>(kernel_.scratch_bytes(args.shape.D, args.shape.D_v))) {}

  int64_t tasks() const { return tiling_.tasks; }

  // Runs on every thread until no task is left: whichever thread is free takes the next one, and
  // the results do not depend on it.
  void work() noexcept {
    thread_local Scratch scratch;
    std::byte* memory = scratch.reserve(scratch_bytes_);
    if (memory == nullptr) {
      out_of_memory_ = true;
      return;
    }
    for (int64_t task; (task = next_task_++) < tiling_.tasks;) {
      kernel_.attend(query_tile(task), memory);
    }
  }

  Status status() const {
    return out_of_memory_ && next_task_ < tiling_.tasks
               ? "attention on the CPU: no memory is left for a thread's working space."
               : kOk;
  }

 private:
  QueryTile query_tile(int64_t task) const;
  void set_row(QueryTile& tile, int row, int64_t b, int64_t h, int64_t q_idx) const;

  const ForwardArgs& args_;
  const Tiling tiling_;
  const TileKernel kernel_;
  const std::size_t scratch_bytes_;
  std::atomic<int64_t> next_task_ = 0;
  std::atomic<bool> out_of_memory_ = false;
};

QueryTile Forward::query_tile(int64_t task) const {
  const Shape& s = args_.shape;
  // Last queries first: under a causal mask they see the most keys, and long tasks at the end would
  // leave threads idle.
  const int64_t q_tile = tiling_.q_tiles - 1 - task % tiling_.q_tiles;
  const int64_t head_tile = task / tiling_.q_tiles % tiling_.head_tiles;
  const int64_t kv_head = task / tiling_.q_tiles / tiling_.head_tiles % s.H_kv;
  const int64_t b = task / tiling_.q_tiles / tiling_.head_tiles / s.H_kv;
  const int64_t q_begin = q_tile * tiling_.queries;
  const int64_t q_end = std::min(q_begin + tiling_.queries, s.S_q);
  const int64_t h_begin = kv_head * s.group() + head_tile * tiling_.heads;
  const int64_t h_end = std::min(h_begin + tiling_.heads, (kv_head + 1) * s.group());

  QueryTile tile;
  for (int64_t h = h_begin; h < h_end; ++h) {
    for (int64_t q_idx = q_begin; q_idx < q_end; ++q_idx) set_row(tile, tile.rows++, b, h, q_idx);
  }
  const auto first = static_cast<int32_t>(q_begin), last = static_cast<int32_t>(q_end);
  const KvRange of_mask = args_.mask.kv_range(first, last);
  tile.in_place = QueryTile::multiplied_in_place(s);
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
  tile.k = static_cast<const std::byte*>(args_.k.data) +
           (b * args_.k.stride_b + kv_head * args_.k.stride_h) * element_bytes(args_.dtype);
  tile.v = static_cast<const std::byte*>(args_.v.data) +
           (b * args_.v.stride_b + kv_head * args_.v.stride_h) * element_bytes(args_.dtype);
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

void Forward::set_row(QueryTile& tile, int row, int64_t b, int64_t h, int64_t q_idx) const {
  const Shape& s = args_.shape;
  const int64_t bytes = element_bytes(args_.dtype);
  const auto address = [&](const View& view) {
    return static_cast<std::byte*>(view.data) +
           (b * view.stride_b + h * view.stride_h + q_idx * view.stride_s) * bytes;
  };
  tile.q[row] = address(args_.q);
  tile.out[row] = address(args_.out);
  tile.lse[row] = static_cast<std::byte*>(args_.lse) +
                  ((b * s.H + h) * s.S_q + q_idx) * (args_.dtype == DType::f64 ? 8 : 4);
  const auto q = static_cast<int32_t>(q_idx);
  tile.visible[row] = args_.mask.kv_range(q, q + 1);
  tile.head[row] = static_cast<uint32_t>(b * s.H + h);
  tile.q_idx[row] = static_cast<uint32_t>(q_idx);
  if (!args_.bias.exists()) return;
  tile.bias[row] = bias_row(args_.bias, args_.dtype, b, h, q_idx);
  tile.visible[row] = without_hidden_ends(args_.bias, tile.bias[row], tile.visible[row]);
}

}  // namespace

Status forward(const ForwardArgs& args, const Launch& launch) {
  if (args.shape.empty()) return kOk;
  Forward forward(args);
  const auto work = [](int64_t, int64_t, void* context) { static_cast<Forward*>(context)->work(); };
  launch.parallel_for(forward.tasks(), 1, work, &forward);
  return forward.status();
}

}  // namespace online_attention::cpu
