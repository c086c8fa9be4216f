// SPDX-License-Identifier: BSD-3-Clause
// The description of one merge of finished parts, and the algebra of one of its rows.
#pragma once

#include "core/problem.h"
#include "core/softmax_row.h"

namespace online_attention {

// The attention of one set of keys: out [B, H, S_q, D_v] of the merge's dtype, lse [B, H, S_q] with
// any strides (stride_s too), of type double if the dtype is f64 and float otherwise.
struct MergePart {
  View out, lse;
};

struct MergeShape {
  int64_t B = 0, H = 0, S_q = 0, D_v = 0;
  ONLINE_ATTENTION_HD int64_t rows() const { return B * H * S_q; }
};

// (E13)
struct MergeArgs {
  DType dtype = DType::f32;
  MergeShape shape;
  const MergePart* parts = nullptr;  // on the host
  int64_t count = 0;
  View out;             // [B, H, S_q, D_v]
  void* lse = nullptr;  // [B, H, S_q] contiguous
};

// (E32), (E33). Needs no result of the merge: <dout, out> is the weighted sum of the <dout, out_r>.
struct MergeBackwardArgs {
  DType dtype = DType::f32;
  MergeShape shape;
  const MergePart* parts = nullptr;  // on the host
  int64_t count = 0;
  View dout;                  // [B, H, S_q, D_v]; data == nullptr counts as 0
  View dlse;                  // [B, H, S_q], strides as those of a part's lse; the same
  View d_outs;                // of part 0, [B, H, S_q, D_v]; data == nullptr: not asked for
  int64_t d_outs_stride = 0;  // elements, from one part to the next
  void* d_lses = nullptr;     // [count, B, H, S_q] contiguous; nullptr: not asked for
};

// One row of a merge. A finished part is a single key of it: its score is the part's lse and its
// value the part's out, so that (E6)-(E10) give (E13). Scores are taken relative to the largest
// lse before they are brought to base 2: their difference is exact, where the product of a large
// lse with log2(e) would be rounded by more than a weight can bear.
template <typename Real>
struct MergedRow {
  Real reference = -kInfinity<Real>;  // the largest lse
  SoftmaxRow<Real> softmax;
  Real inverse_sum = 0;

  // First every lse is shown, then all are absorbed between `begin` and `end`.
  ONLINE_ATTENTION_HD void show(Real lse) { reference = max_of(reference, lse); }
  ONLINE_ATTENTION_HD void begin() { softmax.raise(score(reference)); }
  ONLINE_ATTENTION_HD void absorb(Real lse) { softmax.absorb(1, softmax.weight(score(lse))); }
  ONLINE_ATTENTION_HD void end() { inverse_sum = softmax.inverse_sum(); }

  // w_r. Normalised, so that a sum of w_r out_r overflows no earlier than the out_r do.
  ONLINE_ATTENTION_HD Real weight(Real lse) const {
    return softmax.weight(score(lse)) * inverse_sum;
  }
  ONLINE_ATTENTION_HD Real lse() const { return base() + softmax.lse(); }

  // A part that saw no key: what its out holds does not exist.
  ONLINE_ATTENTION_HD static bool is_empty(Real lse) { return lse == -kInfinity<Real>; }

 private:
  ONLINE_ATTENTION_HD Real base() const { return is_empty(reference) ? Real(0) : reference; }
  ONLINE_ATTENTION_HD Real score(Real lse) const { return (lse - base()) * Real(kLog2e); }
};

}  // namespace online_attention
