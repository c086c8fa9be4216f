# SPDX-License-Identifier: BSD-3-Clause
"""ForwardPlan of the Hopper kernel (csrc/cuda/hopper/forward_plan.h): what the workspace holds."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import given

from test_tile_plan import SMALL, Call

CAUSAL = {"right": 0, "D": 128, "multiprocessors": 132}
FULL = CAUSAL | {"right": 2**31 - 1}
COUNTER_BYTES = 256


def planned(whitebox: ModuleType, call: Call):
    return whitebox.plan_hopper_forward(call.args(whitebox), call.multiprocessors)


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        (Call(H_kv=16, S_q=1024, S_kv=1024, **CAUSAL), False),  # 128 tiles for 132 blocks
        (Call(H_kv=17, S_q=1024, S_kv=1024, **CAUSAL), True),  # 136
        (Call(H_kv=17, S_q=1024, S_kv=1024, **FULL), False),  # no mask
    ],
)
def test_tiles_are_counted_where_they_differ_and_blocks_take_several(
    whitebox: ModuleType, call: Call, counts: bool
):
    plan = planned(whitebox, call)
    assert plan.tiles.splits == 1
    assert plan.counts == counts
    assert plan.workspace_bytes(call.args(whitebox)) == COUNTER_BYTES * counts


@pytest.mark.parametrize(
    ("call", "splits"),
    [
        (Call(H_kv=8, S_q=1024, S_kv=1024, **FULL), 1),  # 64 tiles: a split would spare 4 key tiles
        (Call(H_kv=8, S_q=1024, S_kv=2048, **FULL), 2),  # 8
        (Call(H_kv=1, S_q=1024, S_kv=1024, **FULL), 1),  # a split has four key tiles or more
        (Call(H_kv=1, S_q=128, S_kv=8192, **FULL), 16),
    ],
)
def test_keys_are_split_where_that_spares_more_than_the_merge_costs(
    whitebox: ModuleType, call: Call, splits: int
):
    assert planned(whitebox, call).tiles.splits == splits


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
