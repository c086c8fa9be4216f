// SPDX-License-Identifier: BSD-3-Clause
// The kernels of the SIMT backward pass, and how a call is cut into their blocks.
#pragma once

#include <algorithm>
#include <cfloat>

#include "core/launch.h"
#include "core/problem.h"

namespace online_attention::cuda::portable {

struct BackwardTile {
  int32_t m = 0, n = 0;  // queries and keys
  int32_t columns = 0;   // of D and D_v that one block adds up
};

// Blocks of the key kernel are (b, kv head, key tile, part, column block), those of the query
// kernel (b, head, query tile, column block), the last one fastest.
struct BackwardPlan {
  uint32_t q_tiles = 0, key_tiles = 0;
  uint32_t column_blocks = 1;  // each with its part of D and D_v, and the scores computed again
  uint32_t parts = 1;          // of the queries that see a key tile; sum_parts adds their results
  bool queries_apart = false;  // dQ has a kernel of its own, else the key kernel adds to it
};

// What lies in the workspace: delta (E28), then, if there is more than one part, dK
// [parts, B * H_kv * S_kv, D] before scaling and dV [parts, B * H_kv * S_kv, D_v].
template <typename Real>
struct BackwardBuffers {
  Real* delta = nullptr;
  Real* dk = nullptr;
  Real* dv = nullptr;

  static int64_t kv_rows(const Shape& s) { return s.B * s.H_kv * s.S_kv; }
  static int64_t part_elements(const BackwardPlan& plan, const Shape& s, const View& gradient,
                               int64_t columns) {
    const bool needed = plan.parts > 1 && gradient.data != nullptr;
    return needed ? plan.parts * kv_rows(s) * columns : 0;
  }
  static int64_t bytes(const BackwardPlan& plan, const BackwardArgs& args) {
    const Shape& s = args.shape;
    return static_cast<int64_t>(sizeof(Real)) *
           (s.B * s.H * s.S_q + part_elements(plan, s, args.dk, s.D) +
            part_elements(plan, s, args.dv, s.D_v));
  }
  static BackwardBuffers in(void* workspace, const BackwardPlan& plan, const BackwardArgs& args) {
    const Shape& s = args.shape;
    Real* delta = static_cast<Real*>(workspace);
    Real* dk = delta + s.B * s.H * s.S_q;
    return {delta, dk, dk + part_elements(plan, s, args.dk, s.D)};
  }
};

// c of (E30) and (E31), finite.
template <typename Real>
Real gradient_factor(const BackwardArgs& args) {
  constexpr double kLargest = sizeof(Real) == sizeof(float) ? FLT_MAX : DBL_MAX;
  return static_cast<Real>(std::clamp(args.factor, -kLargest, kLargest));
}

// One compiled pair of kernels: an element type, the columns of a block, whether the rows of all
// inputs are readable in 16-byte pieces, and whether the call has a bias or dropout.
template <typename Element, int kColumns>
BackwardTile simt_backward_tile();

// Whether the rows of q, k, v and dout are readable in 16-byte pieces.
bool has_aligned_inputs(const BackwardArgs& args);

// dK and dV, and dQ unless plan.queries_apart; then dq is zero before.
template <typename Element, int kColumns, bool kAligned, bool kModified>
Status launch_simt_backward_keys(const BackwardArgs& args, const BackwardPlan& plan,
                                 const Launch& launch);

// dQ alone, without atomic additions.
template <typename Element, int kColumns, bool kAligned, bool kModified>
Status launch_simt_backward_queries(const BackwardArgs& args, const BackwardPlan& plan,
                                    const Launch& launch);

// Adds up the parts of dK and dV in order, into dk and dv.
Status sum_parts(const BackwardArgs& args, const BackwardPlan& plan, const Launch& launch);

// dq := 0, for fp32.
Status clear_dq(const BackwardArgs& args, const Launch& launch);

}  // namespace online_attention::cuda::portable
