// SPDX-License-Identifier: BSD-3-Clause
// The contract between the dispatcher (forward.cpp) and the kernels of the instruction sets.
//
// The kernels' files are compiled with wider instruction sets than the rest, so they must not emit
// a function that other files emit too: the linker keeps one copy, and it could be theirs. Hence
// they receive plain data only, are templates on their own instruction set, and take SoftmaxRow's
// members, when not inlined, from forward.cpp.
#pragma once

#include <cstddef>

#include "core/problem.h"
#include "core/softmax_row.h"
#include "cpu/split_keys.h"

namespace online_attention {

extern template struct SoftmaxRow<float>;
extern template struct SoftmaxRow<double>;
extern template float exp2_of<float>(float);
extern template double exp2_of<double>(double);
extern template float log2_of<float>(float);
extern template double log2_of<double>(double);
extern template float max_of<float>(float, float);
extern template double max_of<double>(double, double);

}  // namespace online_attention

namespace online_attention::cpu {

// What a kernel has to know of Dropout: the state itself, not where it lies.
struct DropoutState {
  bool exists = false;
  uint64_t key = 0;
  uint32_t last_word = 0;  // of the counter
  int32_t threshold = 0;
  double keep_scale = 1;
};

// One task: query rows, of one head or of several that share a kv head, against their keys.
struct QueryTile {
  static constexpr int kMaxRows = 192;

  // A kv head with no more query rows, or no more keys, has them multiplied in place: packing does
  // not pay. Its sums are also the more exact ones, as those of others are for so few.
  static constexpr int kFewRows = 16, kFewKeys = 16;
  static bool multiplied_in_place(const Shape& s) {
    return s.S_q * s.group() <= kFewRows || s.S_kv <= kFewKeys;
  }
  // From so many rows on, those of wide elements fill lanes of their own, and sums are those of
  // packed keys, bit by bit.
  static bool multiplied_in_lanes(const Shape& s, DType dtype) {
    const int64_t rows = s.S_q * s.group();
    return kFewRows / 2 < rows && rows <= kFewRows && s.S_kv > kFewKeys && element_bytes(dtype) > 2;
  }

  int rows = 0;
  bool in_place = false;       // by the lengths of the whole kv head alone
  bool in_lanes = false;       // only in place; likewise, and by the type of the elements
  const void* q[kMaxRows];     // [rows][D]
  bool is_part = false;        // out and lse are those of a RowPart
  void* out[kMaxRows];         // [rows][D_v]
  void* lse[kMaxRows];         // [rows]
  KvRange visible[kMaxRows];   // the keys each row sees
  KvRange some_row_sees = {};  // the union of `visible`
  KvRange all_rows_see = {};   // their intersection; begin >= end if empty

  const void* k = nullptr;             // [S_kv][D]
  const void* v = nullptr;             // [S_kv][D_v]
  int64_t k_stride = 0, v_stride = 0;  // elements between two keys
  int64_t D = 0, D_v = 0;
  double sign = 1, scale_log2 = 1;  // of ScoreScale

  BiasType bias_type = BiasType::none;
  int64_t bias_stride = 0;     // elements between two keys
  const void* bias[kMaxRows];  // [rows][S_kv]; not set where there is none
  DropoutState dropout;
  uint32_t head[kMaxRows], q_idx[kMaxRows];  // of the rows; a head of the B * H
};

// What a thread has to do before it first calls some kernel, and after it last did.
struct ThreadState {
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
};

struct TileKernel {
  int64_t (*scratch_bytes)(int64_t D, int64_t D_v);
  void (*attend)(const QueryTile& tile, std::byte* scratch);  // scratch: 64-byte aligned
  void (*join)(const RowParts& parts);
  ThreadState thread = {};
};

namespace baseline {
TileKernel tile_kernel(DType dtype);
}
namespace avx2 {
TileKernel tile_kernel(DType dtype);
}
namespace avx512 {
TileKernel tile_kernel(DType dtype);
}
namespace avx512_bf16 {
TileKernel tile_kernel(DType dtype);
}
namespace amx_bf16 {
TileKernel tile_kernel(DType dtype);
}

}  // namespace online_attention::cpu
