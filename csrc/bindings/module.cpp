// SPDX-License-Identifier: BSD-3-Clause
// The Python module `_C`: loading it registers the operators, and its functions answer from the
// registry and the estimates. Python's limited API alone.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <limits>

#include "core/estimate.h"
#include "cpu/instruction_set.h"
#include "registry.h"

namespace online_attention::bindings {
namespace {

bool parse_dtype(const char* name, DType& dtype) {
  for (int index = 0; index < kDTypes; ++index) {
    dtype = static_cast<DType>(index);
    if (std::strcmp(name, name_of(dtype)) == 0) return true;
  }
  PyErr_Format(PyExc_ValueError, "unknown dtype '%s'", name);
  return false;
}

PyObject* dtype_names(const DTypeSet& dtypes) {
  PyObject* names = PyList_New(0);
  for (int index = 0; names != nullptr && index < kDTypes; ++index) {
    const auto dtype = static_cast<DType>(index);
    if (!dtypes.contains(dtype)) continue;
    PyObject* name = PyUnicode_FromString(name_of(dtype));
    if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* supported(PyObject*, PyObject*) {
  PyObject* rows = PyList_New(0);
  for (const Runner& row : runners()) {
    if (rows == nullptr) break;
    PyObject* entry =
        Py_BuildValue("{s:s, s:s, s:i, s:i, s:N, s:L}", "name", row.name, "device",
                      row.device == DeviceKind::cuda ? "cuda" : "cpu", "arch_min", row.arch_min,
                      "arch_max", row.arch_max, "dtypes", dtype_names(row.dtypes), "head_dim_max",
                      static_cast<long long>(row.head_dim_max));
    if (entry == nullptr || PyList_Append(rows, entry) != 0) Py_CLEAR(rows);
    Py_XDECREF(entry);
  }
  return rows;
}

PyObject* explain_problem(PyObject*, PyObject* args) {
  const char* kind = nullptr;
  const char* dtype_name = nullptr;
  Device device;
  Shape s;
  if (!PyArg_ParseTuple(args, "sisLLLLLLL:explain", &kind, &device.arch, &dtype_name, &s.B, &s.H,
                        &s.H_kv, &s.S_q, &s.S_kv, &s.D, &s.D_v)) {
    return nullptr;
  }
  DType dtype;
  if (!parse_dtype(dtype_name, dtype)) return nullptr;
  device.kind = std::strcmp(kind, "cuda") == 0 ? DeviceKind::cuda : DeviceKind::cpu;
  return PyUnicode_FromString(explain(dtype, s, device).c_str());
}

PyObject* estimate(PyObject*, PyObject* args) {
  Shape s;
  const char* dtype_name = nullptr;
  int alignment = 0;
  long long left = -1;
  long long right = -1;
  long long tile_q = 1;
  if (!PyArg_ParseTuple(args, "LLLLLLLsiLLL:estimate", &s.B, &s.H, &s.H_kv, &s.S_q, &s.S_kv, &s.D,
                        &s.D_v, &dtype_name, &alignment, &left, &right, &tile_q)) {
    return nullptr;
  }
  DType dtype;
  if (!parse_dtype(dtype_name, dtype)) return nullptr;
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (s.S_q < 0 || s.S_kv < 0 || s.S_q > kLimit || s.S_kv > kLimit || tile_q < 1) {
    PyErr_SetString(PyExc_ValueError, "S_q and S_kv must be in [0, 2^31) and tile_q at least 1");
    return nullptr;
  }
  const auto side = [](long long keys) {
    return keys < 0 || keys >= kLimit ? Mask::kUnbounded : static_cast<int32_t>(keys);
  };
  const Mask mask = Mask::window(static_cast<int32_t>(s.S_q), static_cast<int32_t>(s.S_kv),
                                 alignment == 0 ? Alignment::top_left : Alignment::bottom_right,
                                 side(left), side(right));
  return Py_BuildValue("{s:d, s:d, s:d, s:d, s:d, s:d, s:d, s:d}",                          //
                       "flops", forward_flops(s, mask),                                     //
                       "input_bytes", input_bytes(s, dtype),                                //
                       "output_bytes", output_bytes(s, dtype),                              //
                       "score_matrix_bytes", score_matrix_bytes(s, dtype),                  //
                       "naive_traffic_bytes", naive_traffic_bytes(s, dtype),                //
                       "tiled_traffic_bytes", tiled_traffic_bytes(s, dtype, mask, tile_q),  //
                       "naive_peak_bytes", naive_peak_bytes(s, dtype),                      //
                       "tiled_peak_bytes", tiled_peak_bytes(s, dtype));
}

PyObject* built_with_cuda(PyObject*, PyObject*) {
  return PyBool_FromLong(online_attention::built_with_cuda());
}

PyObject* cpu_instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(cpu::instruction_set());
}

PyMethodDef kMethods[] = {
    {"supported", supported, METH_NOARGS, "The rows of the registry, as dictionaries."},
    {"explain", explain_problem, METH_VARARGS, "Which row runs a problem, or why none does."},
    {"estimate", estimate, METH_VARARGS, "Operations and bytes of a problem."},
    {"built_with_cuda", built_with_cuda, METH_NOARGS, "Whether CUDA kernels are built in."},
    {"cpu_instruction_set", cpu_instruction_set, METH_NOARGS,
     "The instruction set the CPU kernels use on this machine."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace online_attention::bindings

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&online_attention::bindings::kModule); }
