// SPDX-License-Identifier: BSD-3-Clause
// csrc/cuda/tile_plan.h, the part of csrc/cuda that needs no CUDA.
#include "cuda/tile_plan.h"

#include <algorithm>
#include <optional>

#include "module.h"

namespace whitebox {
namespace {

using online_attention::cuda::TileCoord;
using online_attention::cuda::TilePlan;
using online_attention::cuda::TileShape;

// The first query that query_of does not give for each of its rows. The rows are all those of the
// tiles of a packed head, those behind its last query too.
std::optional<int64_t> first_wrong_query(const TilePlan& plan) {
  const int64_t rows = int64_t{plan.q_tiles} * plan.tile_m;
  for (int64_t query = 0; query * plan.pack < rows; ++query) {
    const int64_t end = std::min((query + 1) * plan.pack, rows);
    bool right = true;  // no early way out: the compiler vectorises the loop
    for (int64_t row = query * plan.pack; row < end; ++row) {
      right &= plan.query_of(static_cast<int32_t>(row)) == query;
    }
    if (!right) return query;
  }
  return std::nullopt;
}

}  // namespace

void bind_tile_plan(py::module_& module) {
  py::class_<TileShape>(module, "TileShape")
      .def(py::init([](int32_t m, int32_t n, int32_t column_blocks, int32_t blocks_per_sm) {
             return TileShape{m, n, column_blocks, blocks_per_sm};
           }),
           py::kw_only(), py::arg("m"), py::arg("n"), py::arg("column_blocks"),
           py::arg("blocks_per_sm"));

  py::class_<TileCoord>(module, "TileCoord")
      .def(py::init([](int32_t q_tile, int32_t split) {
             return TileCoord{.b = 0, .h = 0, .q_tile = q_tile, .split = split, .column_block = 0};
           }),
           py::kw_only(), py::arg("q_tile"), py::arg("split"))
      .def_readonly("b", &TileCoord::b)
      .def_readonly("h", &TileCoord::h)
      .def_readonly("q_tile", &TileCoord::q_tile)
      .def_readonly("split", &TileCoord::split)
      .def_readonly("column_block", &TileCoord::column_block);

  py::class_<TilePlan> plan(module, "TilePlan");
  plan.def_readonly("tile_m", &TilePlan::tile_m)
      .def_readonly("tile_n", &TilePlan::tile_n)
      .def_readonly("pack", &TilePlan::pack)
      .def_readonly("rows", &TilePlan::rows)
      .def_readonly("keys_per_split", &TilePlan::keys_per_split)
      .def_readonly("group", &TilePlan::group)
      .def_readonly("q_tiles", &TilePlan::q_tiles)
      .def_readonly("column_blocks", &TilePlan::column_blocks)
      .def_readonly("splits", &TilePlan::splits)
      .def_readonly("section_heads", &TilePlan::section_heads)
      .def_readonly("heads", &TilePlan::heads)
      .def_readwrite("lead_heads", &TilePlan::lead_heads)
      .def_readwrite("lead_section_heads", &TilePlan::lead_section_heads)
      .def("tiles", &TilePlan::tiles)
      .def("locate", &TilePlan::locate)
      .def("locate_led", &TilePlan::locate_led)
      .def("query_begin", &TilePlan::query_begin)
      .def("query_end", &TilePlan::query_end)
      .def("keys", &TilePlan::keys)
      .def("first_wrong_query", &first_wrong_query);
  plan.attr("kMaxTiles") = TilePlan::kMaxTiles;
  plan.attr("kMaxPack") = TilePlan::kMaxPack;

  module.def("plan_tiles", &online_attention::cuda::plan_tiles);
}

}  // namespace whitebox
