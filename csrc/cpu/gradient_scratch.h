// SPDX-License-Identifier: BSD-3-Clause
// What one thread holds in memory while it takes the gradients of a key tile.
#pragma once

#include "cpu/gradient_micro_kernel.h"
#include "cpu/gradient_tile.h"

namespace online_attention::cpu {

template <class Operand>
struct GradientScratch {
  using Real = typename Operand::Real;
  using Number = typename Operand::Number;

  static constexpr int kLanes = Operand::Lanes::kLanes;
  static constexpr int kDepth = Operand::kDepth;
  static constexpr int kTileKeys = KeyTile::kMaxKeys;
  static constexpr int kTileRows = QueryRows::kMaxRows;
  static constexpr int kRowSteps = kTileRows / kDepth, kKeySteps = kTileKeys / kDepth;
  // Between two steps of P or dS. A power of two would put them all into few sets of a cache.
  static constexpr int kStepStride = kTileKeys + 64 / static_cast<int>(sizeof(Number));
  static constexpr int kRowStride = kStepStride / kDepth;  // between two rows of dS by keys

  static constexpr int kSpareSlot = GradientKernel::kSlots;  // for what is added to another

  // `memory` may be null: then only `bytes` is right.
  GradientScratch(int64_t D, int64_t D_v, std::byte* memory)
      : D_steps(steps_of<Operand>(D)),
        D_v_steps(steps_of<Operand>(D_v)),
        D_stride(whole_vectors(D)),
        D_v_stride(whole_vectors(D_v)) {
    key_is_finite = take<uint8_t>(memory, kTileKeys);
    k = take<Number>(memory, kTileKeys * D_steps);
    v = take<Number>(memory, kTileKeys * D_v_steps);
    k_columns = take<Number>(memory, kKeySteps * D_stride);
    q = take<Number>(memory, kTileRows * whole_vectors(D_steps));
    dout = take<Number>(memory, kTileRows * whole_vectors(D_v_steps));
    q_columns = take<Number>(memory, kRowSteps * D_stride);
    dout_columns = take<Number>(memory, kRowSteps * D_v_stride);
    p = take<Number>(memory, kRowSteps * kStepStride);
    ds = take<Number>(memory, kRowSteps * kStepStride);
    ds_by_key = kDepth == 1 ? ds : take<Number>(memory, kTileRows * kRowStride);
    dq = take<Real>(memory, (kSpareSlot + 1) * kTileRows * D_stride);
    dk = take<Real>(memory, kTileKeys * D_stride);
    dv = take<Real>(memory, kTileKeys * D_v_stride);
    random = take<uint16_t>(memory, kTileRows * kTileKeys);
  }

  static int64_t whole_vectors(int64_t numbers) { return (numbers + kLanes - 1) / kLanes * kLanes; }

  int64_t D_steps, D_v_steps;    // of a row, in Operand's steps
  int64_t D_stride, D_v_stride;  // of a row, in whole vectors
  uint8_t* key_is_finite;        // [keys]
  Number* k;                     // per panel of keys [D_steps][kPanelKeys]
  Number* v;                     // per panel of keys [D_v_steps][kPanelKeys]
  Number* k_columns;             // per panel of D [key steps][its columns]
  Number* q;                     // per block of rows, in chunks; or in rows

  Number* dout;          // per block of rows, in chunks
  Number* q_columns;     // per panel of D [row steps][its columns]
  Number* dout_columns;  // per panel of D_v [row steps][its columns]
  Number* p;             // [row steps][kStepStride], a column for each key
  Number* ds;            // likewise
  Number* ds_by_key;     // [rows][kRowStride], a column for each key step
  Real* dq;              // [slots][rows][D_stride], of a key tile
  Real* dk;              // [keys][D_stride]
  Real* dv;              // [keys][D_v_stride]
  uint16_t* random;      // [rows][kTileKeys], what decides of dropout
  int64_t bytes = 0;

 private:
  template <class T>
  T* take(std::byte* memory, int64_t count) {
    std::byte* const from = memory == nullptr ? nullptr : memory + bytes;
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(from);
  }
};

}  // namespace online_attention::cpu
