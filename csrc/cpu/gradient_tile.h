// SPDX-License-Identifier: BSD-3-Clause
// The contract between backward.cpp and the kernels of the instruction sets. Plain data, for the
// reason that query_tile.h gives.
#pragma once

#include "cpu/query_tile.h"

namespace online_attention::cpu {

// Keys of one kv head, and where their gradients go.
struct KeyTile {
  static constexpr int kMaxKeys = 192;  // a multiple of every kernel's rows and columns

  KvRange keys = {};
  const void* k = nullptr;  // [keys][D], from the first of `keys` on; so are all of these
  const void* v = nullptr;  // [keys][D_v]
  void* dk = nullptr;       // [keys][D]; nullptr: not asked for
  void* dv = nullptr;       // [keys][D_v]; nullptr: not asked for
  int64_t k_stride = 0, v_stride = 0, dk_stride = 0, dv_stride = 0;  // elements between two keys
  int64_t D = 0, D_v = 0;
  double sign = 1, scale_log2 = 1;  // of ScoreScale
  double factor = 1;                // of BackwardArgs
  int32_t dq_keys = kMaxKeys;       // dq is summed in parts of so many keys, from the first on
  bool wants_dq = false;
  bool wants_ds = false;  // for dq or dk
  bool in_place = false;  // as QueryTile, less what is multiplied in lanes

  BiasType bias_type = BiasType::none;
  int64_t bias_stride = 0;  // elements between two keys
  DropoutState dropout;
};

// Query rows, of one head or of several that share a kv head. What has one number a row lies side
// by side.
struct QueryRows {
  static constexpr int kMaxRows = 96;  // a multiple of every kernel's rows

  int rows = 0;
  const void* q[kMaxRows];     // [rows][D]
  const void* out[kMaxRows];   // [rows][D_v]
  const void* dout[kMaxRows];  // [rows][D_v]
  void* dq[kMaxRows];          // [rows][D]
  void* dq_sum[kMaxRows];      // [rows][D], in the type computed in: sums over earlier key tiles
  KvRange visible[kMaxRows];   // the keys each row sees
  const void* lse = nullptr;   // [rows]
  const void* dlse = nullptr;  // [rows]; nullptr counts as 0
  void* delta = nullptr;       // [rows]
  void* softmax = nullptr;     // [rows], SoftmaxRow of the type computed in
  uint8_t* finite = nullptr;   // [rows], of kFiniteQ and kFiniteDout: what holds no NaN or Inf

  const void* bias[kMaxRows];  // [rows][S_kv], of all keys; not set where there is none
  uint32_t head[kMaxRows], q_idx[kMaxRows];  // of the rows; a head of the B * H
};
inline constexpr uint8_t kFiniteQ = 1, kFiniteDout = 2;

// Whether a key tile is the first, or the last, that some of the rows see.
struct Turn {
  bool first = false, last = false;
};

// `scratch` is 64-byte aligned and one thread's; it carries a key tile from start to finish.
struct GradientKernel {
  static constexpr int kSlots = 4;  // for parts of dq
  int64_t (*scratch_bytes)(int64_t D, int64_t D_v);
  // Delta and the softmax of the rows. Of the keys only D, D_v and what is asked for. Where the
  // result is true, `measure` must take in all keys that the rows see.
  bool (*prepare)(const KeyTile&, const QueryRows&);
  void (*measure)(const KeyTile&, const QueryRows&, std::byte* scratch);
  void (*start)(const KeyTile&, std::byte* scratch);
  // The rows' part of dk and dv, and the keys' part of dq, which is kept in a slot. `next`, if not
  // null, are the rows that come next: they are asked of memory.
  void (*add)(const KeyTile&, const QueryRows&, const QueryRows* next, int slot,
              std::byte* scratch);
  // Adds that part of dq to the sum over key tiles, which the last of these turns into dq.
  void (*add_dq)(const KeyTile&, const QueryRows&, int slot, Turn, std::byte* scratch);
  void (*finish)(const KeyTile&, std::byte* scratch);
  ThreadState thread = {};
};

namespace baseline {
GradientKernel gradient_kernel(DType dtype);
}
namespace avx2 {
GradientKernel gradient_kernel(DType dtype);
}
namespace avx512 {
GradientKernel gradient_kernel(DType dtype);
}
namespace avx512_bf16 {
GradientKernel gradient_kernel(DType dtype);
}
namespace amx_bf16 {
GradientKernel gradient_kernel(DType dtype);
}

}  // namespace online_attention::cpu
