// SPDX-License-Identifier: BSD-3-Clause
// The operators of torch's namespace `online_attention`. Whatever reaches them, also past the
// Python functions, is checked here once more: a wrong call raises ValueError and never crashes.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/site.h"
#include "bindings/tensors.h"
#include "registry.h"

namespace online_attention::bindings {
namespace {

Mask mask_of(const Shape& shape, int64_t alignment, int64_t left, int64_t right) {
  if (alignment != 0 && alignment != 1) {
    throw std::invalid_argument("alignment must be 0 (top left) or 1 (bottom right), not " +
                                std::to_string(alignment) + ".");
  }
  if (left < -1 || right < -1) {
    throw std::invalid_argument("window_left and window_right must be -1 (unbounded) or more.");
  }
  const auto side = [](int64_t keys) {
    const bool unbounded = keys == -1 || keys >= Mask::kUnbounded;
    return unbounded ? Mask::kUnbounded : static_cast<int32_t>(keys);
  };
  return Mask::window(static_cast<int32_t>(shape.S_q), static_cast<int32_t>(shape.S_kv),
                      alignment == 0 ? Alignment::top_left : Alignment::bottom_right, side(left),
                      side(right));
}

double checked_scale(std::optional<double> scale, const Shape& shape) {
  const double value = scale.value_or(1.0 / std::sqrt(static_cast<double>(shape.D)));
  if (!std::isfinite(value)) throw std::invalid_argument("scale must be a finite number.");
  return value;
}

// Broadcast to [B, H, S_q, S_kv]: boolean, of the dtype of q, or float32.
Bias bias_of(const std::optional<Tensor>& bias, const Tensor& q, const Problem& problem) {
  if (!bias) return {};
  const Shape& s = problem.shape;
  const std::array<int64_t, 4> strides =
      broadcast_strides(*bias, "bias", q, {s.B, s.H, s.S_q, s.S_kv});
  const int32_t dtype = dtype_code(*bias);
  BiasType type = BiasType::none;
  if (dtype == aoti_torch_dtype_bool()) type = BiasType::boolean;
  if (dtype == aoti_torch_dtype_float32()) type = BiasType::f32;
  if (dtype == dtype_code(q)) type = BiasType::element;
  if (type == BiasType::none) {
    throw std::invalid_argument("bias must be boolean, of the dtype of q, or float32.");
  }
  return {type, bias->data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

Dropout dropout_of(double dropout_p, const std::optional<Tensor>& rng, const Tensor& q) {
  if (!(dropout_p >= 0 && dropout_p < 1)) {
    throw std::invalid_argument("dropout_p must be at least 0 and below 1.");
  }
  if (dropout_p == 0) return {};
  if (!rng) throw std::invalid_argument("rng must be given where dropout_p is not 0.");
  check_same(*rng, "rng", q, aoti_torch_dtype_int64(), {2});
  if (rng->stride(0) != 1) throw std::invalid_argument("rng must be contiguous.");
  return Dropout::of(dropout_p, static_cast<const uint64_t*>(rng->data_ptr()));
}

const Runner& runner_of(const Problem& problem, const Device& device) {
  const Runner* found = find(problem.dtype, problem.shape, device);
  if (found != nullptr) return *found;
  throw std::invalid_argument(explain(problem.dtype, problem.shape, device));
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                   std::optional<double> scale_or_default, int64_t alignment,
                                   int64_t window_left, int64_t window_right, bool batch_invariant,
                                   std::optional<Tensor> bias, std::optional<Tensor> rng,
                                   double dropout_p) {
  const Problem problem = problem_of(q_any, k_any, v_any);
  const double scale = checked_scale(scale_or_default, problem.shape);
  const Mask mask = mask_of(problem.shape, alignment, window_left, window_right);
  const Site site(q_any);
  runner_of(problem, site.launch.device);  // or a sentence why there is none

  const Tensor q = with_contiguous_rows(q_any);
  const Tensor k = with_contiguous_rows(k_any);
  const Tensor v = with_contiguous_rows(v_any);
  Tensor out = empty_in_order_of(q_any, problem.shape.D_v);
  Tensor lse = empty_lse(q_any, problem);
  if (!problem.shape.empty()) {
    const ForwardArgs args = {.dtype = problem.dtype,
                              .shape = problem.shape,
                              .q = view_of(q),
                              .k = view_of(k),
                              .v = view_of(v),
                              .out = view_of(out),
                              .lse = lse.data_ptr(),
                              .mask = mask,
                              .bias = bias_of(bias, q_any, problem),
                              .dropout = dropout_of(dropout_p, rng, q_any),
                              .scale = ScoreScale::from(scale, problem.dtype),
                              .batch_invariant = batch_invariant};
    run(find_forward(args, site.launch.device), args, site, q);
  }
  return {out, lse};
}

// A gradient shaped like `like`, in its memory order; without elements if it is not asked for.
Tensor gradient_of(const Tensor& like, bool asked, View& view) {
  if (!asked) return empty_elements(like, 0);
  Tensor gradient = empty_in_order_of(like, like.size(3));
  view = view_of(gradient);
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dout_any, std::optional<Tensor> dlse_any, const Tensor& q_any,
    const Tensor& k_any, const Tensor& v_any, const Tensor& out_any, const Tensor& lse_any,
    std::optional<double> scale_or_default, int64_t alignment, int64_t window_left,
    int64_t window_right, bool deterministic, bool needs_dq, bool needs_dk, bool needs_dv,
    std::optional<Tensor> bias, std::optional<Tensor> rng, double dropout_p) {
  const Problem problem = problem_of(q_any, k_any, v_any);
  const Shape& s = problem.shape;
  const double scale = checked_scale(scale_or_default, s);
  const Mask mask = mask_of(s, alignment, window_left, window_right);
  const std::vector<int64_t> rows = {s.B, s.H, s.S_q}, outs = {s.B, s.H, s.S_q, s.D_v};
  check_same(dout_any, "dout", q_any, dtype_code(q_any), outs);
  check_same(out_any, "out", q_any, dtype_code(q_any), outs);
  check_same(lse_any, "lse", q_any, lse_dtype(problem.dtype), rows);
  if (dlse_any) check_same(*dlse_any, "dlse", q_any, lse_dtype(problem.dtype), rows);
  const Site site(q_any);
  runner_of(problem, site.launch.device);  // or a sentence why there is none

  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any),
               v = with_contiguous_rows(v_any), out = with_contiguous_rows(out_any),
               dout = with_contiguous_rows(dout_any), lse = torch::stable::contiguous(lse_any);
  std::optional<Tensor> dlse;
  if (dlse_any) dlse = torch::stable::contiguous(*dlse_any);
  BackwardArgs args = {.dtype = problem.dtype,
                       .shape = s,
                       .q = view_of(q),
                       .k = view_of(k),
                       .v = view_of(v),
                       .out = view_of(out),
                       .dout = view_of(dout),
                       .lse = lse.data_ptr(),
                       .dlse = dlse ? dlse->data_ptr() : nullptr,
                       .mask = mask,
                       .bias = bias_of(bias, q_any, problem),
                       .dropout = dropout_of(dropout_p, rng, q_any),
                       .scale = ScoreScale::from(scale, problem.dtype),
                       .factor = scale,
                       .deterministic = deterministic};
  Tensor dq = gradient_of(q_any, needs_dq, args.dq);
  Tensor dk = gradient_of(k_any, needs_dk, args.dk);
  Tensor dv = gradient_of(v_any, needs_dv, args.dv);
  const bool some_asked = args.dq.data || args.dk.data || args.dv.data;  // and not all are empty
  if (some_asked) {
    if (s.empty() || s.S_kv == 0) {
      for (Tensor* gradient : {&dq, &dk, &dv}) torch::stable::zero_(*gradient);
    } else {
      run(find_backward(args, site.launch.device), args, site, q);
    }
  }
  return {dq, dk, dv};
}

}  // namespace

// bias: [B, H, S_q, S_kv] or broadcast to it in sizes of 1; added to the scores, or where it is
// boolean, whether a pair is visible. rng: two numbers on the device of q, which decide what
// dropout drops; needed unless dropout_p is 0. scale: None is 1/sqrt(D). window_*: keys visible
// beyond the diagonal on that side, -1 = all; causal is window_right = 0.
STABLE_TORCH_LIBRARY(online_attention, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, float? scale, int alignment, SymInt window_left, "
      "SymInt window_right, bool batch_invariant, Tensor? bias=None, Tensor? rng=None, "
      "float dropout_p=0.0) -> (Tensor out, Tensor lse)");
  // A gradient that is not needed comes back without elements.
  m.def(
      "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "float? scale, int alignment, SymInt window_left, SymInt window_right, bool deterministic, "
      "bool needs_dq, bool needs_dk, bool needs_dv, Tensor? bias=None, Tensor? rng=None, "
      "float dropout_p=0.0) -> (Tensor dq, Tensor dk, Tensor dv)");
}
STABLE_TORCH_LIBRARY_IMPL(online_attention, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
STABLE_TORCH_LIBRARY_IMPL(online_attention, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace online_attention::bindings
