// SPDX-License-Identifier: BSD-3-Clause
// The backward pass, pair by pair. (E25)-(E31)
#include "cpu/backward.h"

#include <bit>
#include <cmath>
#include <vector>

#include "core/softmax_row.h"
#include "cpu/element.h"

namespace online_attention::cpu {
namespace {

float load(const float* p) { return *p; }
double load(const double* p) { return *p; }
float load(const Bf16* p) { return std::bit_cast<float>(uint32_t{p->bits} << 16); }
float load(const F16* p) { return static_cast<float>(std::bit_cast<_Float16>(p->bits)); }
void store(float* p, float x) { *p = x; }
void store(double* p, double x) { *p = x; }
void store(Bf16* p, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool nan = x != x;
  p->bits = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void store(F16* p, float x) { p->bits = std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

// One key and value head of one batch element.
template <typename Element>
void backward_head(const BackwardArgs& a, int64_t b, int64_t kv_head) {
  using Real = RealOf<Element>;
  const Shape& s = a.shape;
  std::vector<Real> dk(s.S_kv * s.D), dv(s.S_kv * s.D_v), dq(s.D);
  for (int64_t h = kv_head * s.group(); h < (kv_head + 1) * s.group(); ++h) {
    for (int64_t i = 0; i < s.S_q; ++i) {
      const Element* q = a.q.row<Element>(b, h, i);
      const Element* dout = a.dout.row<Element>(b, h, i);
      const Element* out = a.out.row<Element>(b, h, i);
      const int64_t row = (b * s.H + h) * s.S_q + i;
      Real delta = a.dlse == nullptr ? 0 : -static_cast<const Real*>(a.dlse)[row];
      for (int64_t d = 0; d < s.D_v; ++d) delta += load(dout + d) * load(out + d);
      const auto softmax = SoftmaxRow<Real>::from_lse(static_cast<const Real*>(a.lse)[row]);
      std::fill(dq.begin(), dq.end(), Real(0));
      const auto q_idx = static_cast<int32_t>(i);
      const KvRange seen = a.mask.kv_range(q_idx, q_idx + 1);
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        const Element* k = a.k.row<Element>(b, kv_head, j);
        const Element* v = a.v.row<Element>(b, kv_head, j);
        Real score = 0, dp = 0;
        for (int64_t d = 0; d < s.D; ++d) score += load(q + d) * load(k + d);
        for (int64_t d = 0; d < s.D_v; ++d) dp += load(dout + d) * load(v + d);
        const Real p = softmax.weight(score * Real(a.scale.sign) * Real(a.scale.log2));
        const Real ds = p * (dp - delta) * Real(a.factor);
        for (int64_t d = 0; d < s.D_v; ++d) dv[j * s.D_v + d] += p * load(dout + d);
        for (int64_t d = 0; d < s.D; ++d) dk[j * s.D + d] += ds * load(q + d);
        for (int64_t d = 0; d < s.D; ++d) dq[d] += ds * load(k + d);
      }
      if (a.dq.data == nullptr) continue;
      for (int64_t d = 0; d < s.D; ++d) store(a.dq.row<Element>(b, h, i) + d, dq[d]);
    }
  }
  for (int64_t j = 0; j < s.S_kv; ++j) {
    for (int64_t d = 0; d < s.D && a.dk.data != nullptr; ++d) {
      store(a.dk.row<Element>(b, kv_head, j) + d, dk[j * s.D + d]);
    }
    for (int64_t d = 0; d < s.D_v && a.dv.data != nullptr; ++d) {
      store(a.dv.row<Element>(b, kv_head, j) + d, dv[j * s.D_v + d]);
    }
  }
}

template <typename Element>
void backward_heads(int64_t begin, int64_t end, void* context) {
  const auto& args = *static_cast<const BackwardArgs*>(context);
  for (int64_t head = begin; head < end; ++head) {
    backward_head<Element>(args, head / args.shape.H_kv, head % args.shape.H_kv);
  }
}

}  // namespace

int64_t backward_workspace_bytes(const BackwardArgs&, const Device&) { return 0; }

Status backward(const BackwardArgs& args, const Launch& launch) {
  constexpr ParallelBody bodies[kDTypes] = {backward_heads<F16>, backward_heads<Bf16>,
                                            backward_heads<float>, backward_heads<double>};
  launch.parallel_for(args.shape.B * args.shape.H_kv, 1, bodies[static_cast<int>(args.dtype)],
                      const_cast<BackwardArgs*>(&args));
  return kOk;
}

}  // namespace online_attention::cpu
