// SPDX-License-Identifier: BSD-3-Clause
// csrc/core/softmax_row.h, and the same quantities in long double by the definition, as the oracle.
#include "core/softmax_row.h"

#include <string>
#include <vector>

#include "core/hd.h"
#include "module.h"

namespace whitebox {
namespace {

using online_attention::exp2_of;
using online_attention::kInfinity;
using online_attention::log2_of;
using online_attention::max_of;
using online_attention::SoftmaxRow;

template <typename Real>
void bind_row(py::module_& module, const char* name) {
  using Row = SoftmaxRow<Real>;
  py::class_<Row>(module, name)
      .def(py::init<>())
      .def(py::init([](Real m, Real l) { return Row{m, l}; }), py::arg("m"), py::arg("l"))
      .def_readwrite("m", &Row::m)
      .def_readwrite("l", &Row::l)
      .def("base", &Row::base)
      .def("raise_to", &Row::raise)  // `raise` is a keyword of Python
      .def("raise_lazily", &Row::raise_lazily)
      .def("weight", &Row::weight)
      .def("absorb", &Row::absorb)
      .def("rescale_to", &Row::rescale_to)
      .def("inverse_sum", &Row::inverse_sum)
      .def("lse", &Row::lse)
      .def_static("merge", &Row::merge)
      .def_static("from_lse", &Row::from_lse)
      .def("__repr__", [name = std::string(name)](const Row& row) {
        return name + "(m=" + std::to_string(row.m) + ", l=" + std::to_string(row.l) + ")";
      });
}

template <typename Real>
void bind_scalar_functions(py::module_& module, const std::string& suffix) {
  module.def(("exp2_of_" + suffix).c_str(), &exp2_of<Real>);
  module.def(("log2_of_" + suffix).c_str(), &log2_of<Real>);
  module.def(("max_of_" + suffix).c_str(), &max_of<Real>);
}

// Largest score, sum of 2^(score - largest) and sum of 2^(score - largest) * value.
struct Sums {
  long double m = -kInfinity<long double>, l = 0, out = 0;
};

Sums sums_of(const std::vector<double>& scores_log2, const std::vector<double>& values) {
  Sums sums;
  for (const double s2 : scores_log2) sums.m = s2 > sums.m ? s2 : sums.m;
  if (sums.m == -kInfinity<long double>) return sums;
  for (std::size_t j = 0; j < scores_log2.size(); ++j) {
    const long double p = std::exp2(scores_log2[j] - sums.m);
    sums.l += p;
    if (!values.empty()) sums.out += p * values[j];
  }
  return sums;
}

constexpr long double kLn2Exact = 0.693147180559945309417232121458176568L;

double exact_lse(const std::vector<double>& scores_log2) {
  const Sums sums = sums_of(scores_log2, {});
  if (sums.l == 0) return -kInfinity<double>;
  return static_cast<double>(kLn2Exact * (sums.m + std::log2(sums.l)));
}

double exact_output(const std::vector<double>& scores_log2, const std::vector<double>& values) {
  const Sums sums = sums_of(scores_log2, values);
  return sums.l == 0 ? 0.0 : static_cast<double>(sums.out / sums.l);
}

}  // namespace

void bind_softmax_row(py::module_& module) {
  bind_row<float>(module, "SoftmaxRowF32");
  bind_row<double>(module, "SoftmaxRowF64");
  bind_scalar_functions<float>(module, "f32");
  bind_scalar_functions<double>(module, "f64");
  module.def("ceil_div", &online_attention::ceil_div<int64_t>);
  module.def("exact_lse", &exact_lse, py::arg("scores_log2"));
  module.def("exact_output", &exact_output, py::arg("scores_log2"), py::arg("values"));
  module.attr("LOG2E") = online_attention::kLog2e;
  module.attr("LN2") = online_attention::kLn2;
}

}  // namespace whitebox
