// SPDX-License-Identifier: BSD-3-Clause
// Cuts the problem into key tiles and hands them to the threads. (E25)-(E31)
//
// One pass, five products: the thread that has a key tile takes all query rows past it, sums dk and
// dv by itself, and adds its part of dq to a sum that all key tiles share. That sum is taken in the
// order of the keys, whoever is first: a thread that comes early keeps its part and goes on, and
// waits when it can keep no more. It waits only for tasks that were begun before its own, so that
// any number of threads gets to the end.
//
// Workspace: three numbers and a byte a row, D floats for narrow types, four bytes a set of rows.
#include "cpu/backward.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>

#include "cpu/bias_and_dropout.h"
#include "cpu/gradient_tile.h"
#include "cpu/gradient_tiling.h"
#include "cpu/instruction_set.h"
#include "cpu/scratch.h"

namespace online_attention::cpu {
namespace {

GradientKernel gradient_kernel(DType dtype) {
#if defined(__x86_64__)
  switch (chosen_instruction_set()) {
    case InstructionSet::amx_bf16:
      return amx_bf16::gradient_kernel(dtype);
    case InstructionSet::avx512_bf16:
      return avx512_bf16::gradient_kernel(dtype);
    case InstructionSet::avx512:
      return avx512::gradient_kernel(dtype);
    case InstructionSet::avx2:
      return avx2::gradient_kernel(dtype);
    case InstructionSet::baseline:
      break;
  }
#endif
  return baseline::gradient_kernel(dtype);
}

// Where the parts of the workspace begin. `memory` may be null: then only `bytes` is right.
struct Workspace {
  Workspace(const BackwardArgs& args, const GradientTiling& tiling, void* memory) {
    const Shape& s = args.shape;
    const int64_t rows = s.B * s.H * s.S_q, real = args.dtype == DType::f64 ? 8 : 4;
    const auto take = [&](int64_t part_bytes) {
      std::byte* const from = memory == nullptr ? nullptr : static_cast<std::byte*>(memory) + bytes;
      bytes += ceil_div<int64_t>(part_bytes, 64) * 64;
      return from;
    };
    const int64_t sets = s.B * s.H_kv * tiling.sets();
    tiles_added = reinterpret_cast<std::atomic<int32_t>*>(
        take(sets * static_cast<int64_t>(sizeof(std::atomic<int32_t>))));
    finite = reinterpret_cast<uint8_t*>(take(rows));
    delta = take(rows * real);
    softmax = take(rows * 2 * real);
    // Of the wide types, dq itself holds the sums.
    const bool narrow = element_bytes(args.dtype) < real;
    if (narrow && args.dq.data != nullptr) dq_sum = take(rows * s.D * real);
  }

  std::atomic<int32_t>* tiles_added = nullptr;  // to dq, of each set of rows
  uint8_t* finite = nullptr;                    // [B, H, S_q], of QueryRows
  std::byte* delta = nullptr;                   // [B, H, S_q]
  std::byte* softmax = nullptr;                 // [B, H, S_q]
  std::byte* dq_sum = nullptr;                  // [B, H, S_q, D]; null: not needed
  int64_t bytes = 0;
};

class Backward {
 public:
  Backward(const BackwardArgs& args, void* workspace)
      : args_(args),
        tiling_(args.shape),
        workspace_(args, tiling_, workspace),
        kernel_(gradient_kernel(args.dtype)),
        scratch_bytes_(
            static_cast<std::size_t>(kernel_.scratch_bytes(args.shape.D, args.shape.D_v))) {
    for (int64_t set = 0; set < sets(); ++set) new (workspace_.tiles_added + set) Counter(0);
  }

  int64_t kv_heads() const { return args_.shape.B * args_.shape.H_kv; }
  int64_t sets() const { return kv_heads() * tiling_.sets(); }
  int64_t tasks() const { return kv_heads() * tiling_.key_tiles; }

  // Whether each set is worked on by one task alone, which then prepares it, too.
  bool tasks_prepare() const { return tiling_.key_tiles == 1; }

  void prepare(int64_t begin, int64_t end) noexcept {
    std::byte* memory = scratch();
    const InThreadState state(kernel_.thread);
    for (int64_t set = begin; set < end && memory != nullptr; ++set) prepare(set, memory);
  }

  void work() noexcept;

  Status status() const {
    return out_of_memory_ ? "attention on the CPU: no memory is left for a thread's working space."
                          : kOk;
  }

 private:
  using Counter = std::atomic<int32_t>;
  class DqParts;

  // nullptr if there is no memory.
  std::byte* scratch() {
    thread_local Scratch scratch;
    std::byte* memory = scratch.reserve(scratch_bytes_);
    if (memory == nullptr) out_of_memory_ = true;
    return memory;
  }

  void prepare(int64_t set, std::byte* scratch) const;
  void run(int64_t kv_head, int64_t key_tile, DqParts& parts, std::byte* scratch) const;
  KeyTile key_tile(int64_t kv_head, int64_t index) const;
  QueryRows query_rows(int64_t set) const;
  void set_row(QueryRows& rows, int row, int64_t b, int64_t h, int64_t q_idx) const;

  // The queries of a set, [begin, end).
  KvRange queries(int64_t q_tile) const {
    const int64_t begin = q_tile * tiling_.queries;
    return {static_cast<int32_t>(begin),
            static_cast<int32_t>(std::min(begin + tiling_.queries, args_.shape.S_q))};
  }
  // The key tiles that a set sees, [begin, end).
  KvRange key_tiles_of(int64_t q_tile) const {
    const KvRange q = queries(q_tile);
    const KvRange keys = args_.mask.kv_range(q.begin, q.end);
    if (keys.size() == 0) return {};
    return {static_cast<int32_t>(keys.begin / tiling_.keys),
            static_cast<int32_t>((keys.end - 1) / tiling_.keys + 1)};
  }

  const BackwardArgs& args_;
  const GradientTiling tiling_;
  const Workspace workspace_;
  const GradientKernel kernel_;
  const std::size_t scratch_bytes_;
  std::atomic<int64_t> next_task_ = 0;
  std::atomic<bool> out_of_memory_ = false;
};

// One thread's parts of dq whose turn has not come, in the order of their tasks and sets. A thread
// waits for the first of them alone, so for a key tile before that one's; of all threads that wait,
// the one whose tile is the first waits for a thread that works.
class Backward::DqParts {
 public:
  DqParts(const Backward& backward, std::byte* scratch) : backward_(backward), scratch_(scratch) {}

  // Waits where all slots are taken.
  int free_slot() {
    if (kept_ == kSlots) wait_for_first();
    return (first_ + kept_) % kSlots;
  }

  // What lies in the free slot is the part of these keys and this set.
  void keep(const KeyTile& keys, int64_t key_tile, int64_t set) {
    parts_[(first_ + kept_++) % kSlots] = {keys, key_tile, set};
    while (kept_ > 0 && is_turn()) add_first();
  }

  void add_all() {
    while (kept_ > 0) wait_for_first();
  }

 private:
  static constexpr int kSlots = GradientKernel::kSlots;
  struct Part {
    KeyTile keys;
    int64_t key_tile = 0, set = 0;
  };

  Counter& tiles_added() const { return backward_.workspace_.tiles_added[parts_[first_].set]; }
  KvRange key_tiles() const {
    return backward_.key_tiles_of(parts_[first_].set % backward_.tiling_.q_tiles);
  }
  int32_t tiles_before() const {
    return static_cast<int32_t>(parts_[first_].key_tile - key_tiles().begin);
  }
  bool is_turn() const { return tiles_added().load(std::memory_order_acquire) == tiles_before(); }

  // A turn is a matter of microseconds, what the system does with a yielded core one of
  // milliseconds: it gets one where turns do not come because there are more threads than cores.
  void wait_for_first() {
    for (int spins = 0; !is_turn(); ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    add_first();
  }
  static constexpr int kSpins = 4096;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void add_first() {
    const Part& part = parts_[first_];
    const Turn turn = {tiles_before() == 0, part.key_tile + 1 == key_tiles().end};
    backward_.kernel_.add_dq(part.keys, backward_.query_rows(part.set), first_, turn, scratch_);
    tiles_added().store(tiles_before() + 1, std::memory_order_release);
    first_ = (first_ + 1) % kSlots;
    --kept_;
  }

  const Backward& backward_;
  std::byte* const scratch_;
  Part parts_[kSlots];
  int first_ = 0, kept_ = 0;
};

// Runs on every thread until no task is left. Tasks are begun in the order of their keys.
void Backward::work() noexcept {
  std::byte* memory = scratch();
  if (memory == nullptr) return;
  const InThreadState state(kernel_.thread);
  DqParts parts(*this, memory);
  for (int64_t task; (task = next_task_++) < tasks();) {
    run(task % kv_heads(), task / kv_heads(), parts, memory);
  }
  parts.add_all();
}

// (E28), the softmax of each row, and zeros for dq of rows that no key tile will visit.
void Backward::prepare(int64_t set, std::byte* scratch) const {
  const Shape& s = args_.shape;
  const QueryRows rows = query_rows(set);
  const KvRange key_tiles = key_tiles_of(set % tiling_.q_tiles);
  const int64_t kv_head = set / tiling_.sets();
  if (kernel_.prepare(key_tile(kv_head, 0), rows)) {
    for (int64_t i = key_tiles.begin; i < key_tiles.end; ++i) {
      kernel_.measure(key_tile(kv_head, i), rows, scratch);
    }
  }
  if (args_.dq.data == nullptr || key_tiles.size() > 0) return;
  for (int row = 0; row < rows.rows; ++row) {
    std::fill_n(static_cast<std::byte*>(rows.dq[row]), s.D * element_bytes(args_.dtype),
                std::byte{0});
  }
}

void Backward::run(int64_t kv_head, int64_t key_tile_index, DqParts& parts,
                   std::byte* scratch) const {
  const KeyTile keys = key_tile(kv_head, key_tile_index);
  const int64_t end = (kv_head + 1) * tiling_.sets();
  for (int64_t set = kv_head * tiling_.sets(); tasks_prepare() && set < end; ++set) {
    prepare(set, scratch);
  }
  kernel_.start(keys, scratch);
  const auto first_that_sees = [&](int64_t set) {
    for (; set < end; ++set) {
      const KvRange seen = key_tiles_of(set % tiling_.q_tiles);
      if (seen.begin <= key_tile_index && key_tile_index < seen.end) break;
    }
    return set;
  };
  QueryRows rows[2];  // of this set and the next, in turn
  int64_t set = first_that_sees(kv_head * tiling_.sets());
  if (set < end) rows[0] = query_rows(set);
  for (int now = 0; set < end; now = 1 - now) {
    const int64_t next = first_that_sees(set + 1);
    if (next < end) rows[1 - now] = query_rows(next);
    kernel_.add(keys, rows[now], next < end ? &rows[1 - now] : nullptr, parts.free_slot(), scratch);
    if (keys.wants_dq) parts.keep(keys, key_tile_index, set);
    set = next;
  }
  kernel_.finish(keys, scratch);
}

KeyTile Backward::key_tile(int64_t kv_head, int64_t index) const {
  const Shape& s = args_.shape;
  const int64_t b = kv_head / s.H_kv, h = kv_head % s.H_kv, first = index * tiling_.keys;
  const auto address = [&](const View& view) {
    const int64_t element = b * view.stride_b + h * view.stride_h + first * view.stride_s;
    return view.data == nullptr
               ? nullptr
               : static_cast<std::byte*>(view.data) + element * element_bytes(args_.dtype);
  };
  const double largest = args_.dtype == DType::f64 ? DBL_MAX : double{FLT_MAX};
  KeyTile tile;
  tile.keys = {static_cast<int32_t>(first),
               static_cast<int32_t>(std::min(first + tiling_.keys, s.S_kv))};
  tile.k = address(args_.k);
  tile.v = address(args_.v);
  tile.dk = address(args_.dk);
  tile.dv = address(args_.dv);
  tile.k_stride = args_.k.stride_s;
  tile.v_stride = args_.v.stride_s;
  tile.dk_stride = args_.dk.stride_s;
  tile.dv_stride = args_.dv.stride_s;
  tile.D = s.D;
  tile.D_v = s.D_v;
  tile.sign = args_.scale.sign;
  tile.scale_log2 = args_.scale.log2;
  tile.factor = std::clamp(args_.factor, -largest, largest);
  tile.dq_keys = static_cast<int32_t>(tiling_.dq_keys);
  tile.wants_dq = args_.dq.data != nullptr;
  tile.wants_ds = tile.wants_dq || tile.dk != nullptr;
  tile.in_place =
      QueryTile::multiplied_in_place(s) && !QueryTile::multiplied_in_lanes(s, args_.dtype);
  tile.bias_type = args_.bias.type;
  tile.bias_stride = args_.bias.stride_kv;
  tile.dropout = dropout_state(args_.dropout);
  return tile;
}

QueryRows Backward::query_rows(int64_t set) const {
  const Shape& s = args_.shape;
  const int64_t kv_head = set / tiling_.sets() % s.H_kv, b = set / tiling_.sets() / s.H_kv;
  const int64_t head_tile = set % tiling_.sets() / tiling_.q_tiles;
  const int64_t h_begin = kv_head * s.group() + head_tile * tiling_.heads;
  const int64_t h_end = std::min(h_begin + tiling_.heads, (kv_head + 1) * s.group());
  const KvRange q = queries(set % tiling_.q_tiles);

  QueryRows rows;
  for (int64_t h = h_begin; h < h_end; ++h) {
    for (int64_t q_idx = q.begin; q_idx < q.end; ++q_idx) set_row(rows, rows.rows++, b, h, q_idx);
  }
  // Side by side: a set of several heads holds all queries of each.
  const int64_t first = (b * s.H + h_begin) * s.S_q + q.begin;
  const int64_t offset = first * (args_.dtype == DType::f64 ? 8 : 4);
  rows.lse = static_cast<const std::byte*>(args_.lse) + offset;
  if (args_.dlse != nullptr) rows.dlse = static_cast<const std::byte*>(args_.dlse) + offset;
  rows.delta = workspace_.delta + offset;
  rows.softmax = workspace_.softmax + 2 * offset;
  rows.finite = workspace_.finite + first;
  return rows;
}

void Backward::set_row(QueryRows& rows, int row, int64_t b, int64_t h, int64_t q_idx) const {
  const Shape& s = args_.shape;
  const auto address = [&](const View& view) {
    return static_cast<std::byte*>(view.data) +
           (b * view.stride_b + h * view.stride_h + q_idx * view.stride_s) *
               element_bytes(args_.dtype);
  };
  rows.q[row] = address(args_.q);
  rows.out[row] = address(args_.out);
  rows.dout[row] = address(args_.dout);
  if (args_.dq.data != nullptr) {
    rows.dq[row] = address(args_.dq);
    rows.dq_sum[row] = workspace_.dq_sum == nullptr
                           ? rows.dq[row]
                           : workspace_.dq_sum + ((b * s.H + h) * s.S_q + q_idx) * s.D * 4;
  }
  const auto q = static_cast<int32_t>(q_idx);
  rows.visible[row] = args_.mask.kv_range(q, q + 1);
  rows.head[row] = static_cast<uint32_t>(b * s.H + h);
  rows.q_idx[row] = static_cast<uint32_t>(q_idx);
  if (!args_.bias.exists()) return;
  rows.bias[row] = bias_row(args_.bias, args_.dtype, b, h, q_idx);
  rows.visible[row] = without_hidden_ends(args_.bias, rows.bias[row], rows.visible[row]);
}

}  // namespace

int64_t backward_workspace_bytes(const BackwardArgs& args, const Device&) {
  return Workspace(args, GradientTiling(args.shape), nullptr).bytes;
}

Status backward(const BackwardArgs& args, const Launch& launch) {
  Backward backward(args, launch.workspace);
  const auto prepare = [](int64_t begin, int64_t end, void* context) {
    static_cast<Backward*>(context)->prepare(begin, end);
  };
  const auto work = [](int64_t, int64_t, void* context) {
    static_cast<Backward*>(context)->work();
  };
  if (!backward.tasks_prepare()) launch.parallel_for(backward.sets(), 1, prepare, &backward);
  if (backward.status() == kOk) launch.parallel_for(backward.tasks(), 1, work, &backward);
  return backward.status();
}

}  // namespace online_attention::cpu
