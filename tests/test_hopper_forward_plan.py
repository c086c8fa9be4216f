# SPDX-License-Identifier: BSD-3-Clause
"""ForwardPlan of the Hopper kernel (csrc/cuda/hopper/forward_plan.h): what the workspace holds."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import given

from test_tile_plan import SMALL, Call

CAUSAL = {"right": 0, "D": 128, "multiprocessors": 132}
COUNTER_BYTES = 256


def planned(whitebox: ModuleType, call: Call):
    return whitebox.plan_hopper_forward(call.args(whitebox), call.multiprocessors)


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        (Call(H_kv=16, S_q=1024, S_kv=1024, **CAUSAL), False),  # 128 tiles for 132 blocks
        (Call(H_kv=17, S_q=1024, S_kv=1024, **CAUSAL), True),  # 136
        (Call(H_kv=17, S_q=1024, S_kv=1024, **CAUSAL | {"right": 2**31 - 1}), False),  # no mask
    ],
)
def test_tiles_are_counted_where_they_differ_and_blocks_take_several(
    whitebox: ModuleType, call: Call, counts: bool
):
    plan = planned(whitebox, call)
    assert plan.tiles.splits == 1
    assert plan.counts == counts
    assert plan.workspace_bytes(call.args(whitebox)) == COUNTER_BYTES * counts


@given(call=SMALL)
def test_the_workspace_is_the_counter_and_the_partial_results(whitebox: ModuleType, call: Call):
    plan = planned(whitebox, call)
    tiles = plan.tiles
    assert plan.counts <= (tiles.tiles() > call.multiprocessors)
    rows = call.B * call.heads * call.S_q
    row_bytes = (call.D + call.D % 2 + 2) * 4
    partial = tiles.splits * rows * row_bytes if tiles.splits > 1 else 0
    assert plan.workspace_bytes(call.args(whitebox)) == COUNTER_BYTES * plan.counts + partial
    assert 0 <= plan.first_query <= plan.last_query <= call.S_q
