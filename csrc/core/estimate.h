// SPDX-License-Identifier: BSD-3-Clause
// What an attention call costs before it is run: operations, bytes through device memory, and peak
// memory, for the naive route (which stores the score matrix) and the tiled one (which does not).
// docs/algorithm.md derives the counts.
#pragma once

#include "core/problem.h"

namespace online_attention {

// Query-key pairs the mask leaves, for one head of one batch element.
inline int64_t visible_pairs(int64_t s_q, const Mask& mask) {
  if (!mask.is_banded()) return s_q * mask.s_kv;
  int64_t pairs = 0;
  for (int64_t q_idx = 0; q_idx < s_q; ++q_idx) {
    const auto q = static_cast<int32_t>(q_idx);
    pairs += mask.kv_range(q, q + 1).size();
  }
  return pairs;
}

// Two products of a multiply and an add for each visible pair: q k^T over D, p v over D_v.
inline double forward_flops(const Shape& s, const Mask& mask) {
  return 2.0 * static_cast<double>(s.B * s.H) * static_cast<double>(visible_pairs(s.S_q, mask)) *
         static_cast<double>(s.D + s.D_v);
}

inline double input_bytes(const Shape& s, DType dtype) {
  const int64_t elements = s.B * (s.H * s.S_q * s.D + s.H_kv * s.S_kv * (s.D + s.D_v));
  return static_cast<double>(elements) * static_cast<double>(element_bytes(dtype));
}

inline double output_bytes(const Shape& s, DType dtype) {
  return static_cast<double>(s.B * s.H * s.S_q) *
         static_cast<double>(s.D_v * element_bytes(dtype) + (dtype == DType::f64 ? 8 : 4));
}

// The score matrix of the naive route, held in the inputs' dtype. Masking does not shrink it.
inline double score_matrix_bytes(const Shape& s, DType dtype) {
  return static_cast<double>(s.B * s.H * s.S_q) * static_cast<double>(s.S_kv) *
         static_cast<double>(element_bytes(dtype));
}

// Naive: scores are written by q k^T, read and written by softmax, read again by p v.
inline double naive_traffic_bytes(const Shape& s, DType dtype) {
  return input_bytes(s, dtype) + output_bytes(s, dtype) + 4 * score_matrix_bytes(s, dtype);
}

// Tiled: q is read once, out and lse are written once, and each tile of `tile_q` queries reads the
// keys and values it sees. No cache is assumed: this is the traffic below the tiles.
inline double tiled_traffic_bytes(const Shape& s, DType dtype, const Mask& mask, int64_t tile_q) {
  int64_t keys_read = 0;
  for (int64_t begin = 0; begin < s.S_q; begin += tile_q) {
    const int64_t end = begin + tile_q < s.S_q ? begin + tile_q : s.S_q;
    keys_read += mask.kv_range(static_cast<int32_t>(begin), static_cast<int32_t>(end)).size();
  }
  const double q_elements = static_cast<double>(s.B * s.H * s.S_q) * static_cast<double>(s.D);
  const double kv_elements = static_cast<double>(s.B * s.H) * static_cast<double>(keys_read) *
                             static_cast<double>(s.D + s.D_v);
  return (q_elements + kv_elements) * static_cast<double>(element_bytes(dtype)) +
         output_bytes(s, dtype);
}

// Memory alive at the worst moment. The naive route holds scores and probabilities at once.
inline double naive_peak_bytes(const Shape& s, DType dtype) {
  return input_bytes(s, dtype) + output_bytes(s, dtype) + 2 * score_matrix_bytes(s, dtype);
}
inline double tiled_peak_bytes(const Shape& s, DType dtype) {
  return input_bytes(s, dtype) + output_bytes(s, dtype);
}

}  // namespace online_attention
