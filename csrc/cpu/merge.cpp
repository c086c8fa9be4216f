// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/merge.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "cpu/instruction_set.h"
#include "cpu/merge_kernel.h"

namespace online_attention::cpu {
namespace {

template <typename Element>
MergeKernel<Element> chosen_kernel() {
#if defined(__x86_64__)
  if (chosen_instruction_set() >= InstructionSet::avx2) return avx2::merge_kernel<Element>();
#endif
  return baseline::merge_kernel<Element>();
}

// One call on all threads: the rows it is cut into, and whether a thread lacked memory.
template <typename Args>
struct Call {
  const Args& args;
  std::atomic<bool> out_of_memory = false;

  // Rows of one task: enough elements to be worth a thread's start.
  int64_t grain() const {
    constexpr int64_t kElements = 1 << 15;
    return std::max<int64_t>(1, kElements / ((args.count + 1) * (args.shape.D_v + 8)));
  }
  Status run(ParallelBody body, const Launch& launch) {
    launch.parallel_for(args.shape.rows(), grain(), body, this);
    return out_of_memory ? "merge on the CPU: no memory is left for a thread's working space."
                         : kOk;
  }
};

struct RowIndex {
  RowIndex(int64_t row, const MergeShape& shape)
      : b(row / shape.S_q / shape.H), h(row / shape.S_q % shape.H), s(row % shape.S_q) {}
  template <typename T>
  T* in(const View& view) const {
    return view.row<T>(b, h, s);
  }
  int64_t b, h, s;
};

// The parts of one row with their weights w_r. An empty part has no data.
template <typename Element, typename Args>
MergedRow<RealOf<Element>> weigh(const Args& args, const RowIndex& index,
                                 WeightedRow<Element>* parts) {
  using Real = RealOf<Element>;
  const auto lse = [&](int64_t r) { return *index.in<const Real>(args.parts[r].lse); };
  MergedRow<Real> row;
  for (int64_t r = 0; r < args.count; ++r) row.show(lse(r));
  row.begin();
  for (int64_t r = 0; r < args.count; ++r) row.absorb(lse(r));
  row.end();
  for (int64_t r = 0; r < args.count; ++r) {
    const bool empty = row.is_empty(lse(r));
    parts[r] = {empty ? nullptr : index.in<const Element>(args.parts[r].out), row.weight(lse(r))};
  }
  return row;
}

template <typename Element>
struct Merge {
  using Args = MergeArgs;
  using Real = RealOf<Element>;

  static void run_row(const MergeArgs& a, int64_t i, WeightedRow<Element>* parts,
                      const MergeKernel<Element>& kernel) {
    const RowIndex index(i, a.shape);
    const auto row = weigh(a, index, parts);
    const auto is_empty = [](const WeightedRow<Element>& part) { return part.data == nullptr; };
    const auto* end = std::remove_if(parts, parts + a.count, is_empty);
    kernel.weighted_sum(parts, end - parts, a.shape.D_v, index.in<Element>(a.out));
    static_cast<Real*>(a.lse)[i] = row.lse();
  }
};

template <typename Element>
struct MergeBackward {
  using Args = MergeBackwardArgs;
  using Real = RealOf<Element>;

  static void run_row(const MergeBackwardArgs& a, int64_t i, WeightedRow<Element>* parts,
                      const MergeKernel<Element>& kernel) {
    const RowIndex index(i, a.shape);
    weigh(a, index, parts);
    const bool has_dout = a.dout.data != nullptr;
    const Element* dout = has_dout ? index.in<const Element>(a.dout) : nullptr;
    if (a.d_outs.data != nullptr) {
      Element* d_out = index.in<Element>(a.d_outs);
      for (int64_t r = 0; r < a.count; ++r, d_out += a.d_outs_stride) {
        const WeightedRow<Element> weighted = {dout, parts[r].weight};
        const bool visible = has_dout && parts[r].data != nullptr;
        kernel.weighted_sum(&weighted, visible ? 1 : 0, a.shape.D_v, d_out);  // (E32)
      }
    }
    if (a.d_lses == nullptr) return;
    const Real dlse = a.dlse.data == nullptr ? 0 : *index.in<const Real>(a.dlse);
    const auto d_lse = [&](int64_t r) -> Real& {
      return static_cast<Real*>(a.d_lses)[r * a.shape.rows() + i];
    };
    Real whole = 0;  // <dout, out>
    for (int64_t r = 0; r < a.count; ++r) {
      if (parts[r].data == nullptr) continue;
      d_lse(r) = has_dout ? kernel.dot(dout, parts[r].data, a.shape.D_v) : 0;
      whole += parts[r].weight * d_lse(r);
    }
    for (int64_t r = 0; r < a.count; ++r) {
      const bool empty = parts[r].data == nullptr;
      d_lse(r) = empty ? 0 : parts[r].weight * (dlse + (d_lse(r) - whole));  // (E33)
    }
  }
};

template <typename Pass, typename Element>
void run_rows(int64_t begin, int64_t end, void* context) {
  auto& call = *static_cast<Call<typename Pass::Args>*>(context);
  const MergeKernel<Element> kernel = chosen_kernel<Element>();
  const std::unique_ptr<WeightedRow<Element>[]> parts(new (std::nothrow)
                                                          WeightedRow<Element>[call.args.count]);
  if (parts == nullptr) {
    call.out_of_memory = true;
    return;
  }
  for (int64_t i = begin; i < end; ++i) Pass::run_row(call.args, i, parts.get(), kernel);
}

template <template <typename> typename Pass, typename Args>
Status run(const Args& args, const Launch& launch) {
  constexpr ParallelBody bodies[kDTypes] = {run_rows<Pass<F16>, F16>, run_rows<Pass<Bf16>, Bf16>,
                                            run_rows<Pass<float>, float>,
                                            run_rows<Pass<double>, double>};
  return Call<Args>{args}.run(bodies[static_cast<int>(args.dtype)], launch);
}

}  // namespace

Status merge(const MergeArgs& args, const Launch& launch) { return run<Merge>(args, launch); }

Status merge_backward(const MergeBackwardArgs& args, const Launch& launch) {
  return run<MergeBackward>(args, launch);
}

}  // namespace online_attention::cpu
