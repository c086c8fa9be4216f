# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper backward kernel's layouts (csrc/cuda/hopper/backward_config.h): what its threads write
in one order others read in another. And its plan: who begins when, where key tiles add in order.
"""

from __future__ import annotations

from types import ModuleType

import pytest

SMEM_BYTES = 227 * 1024  # what a block may have
SWIZZLED = 1024  # what tiles that the copy engine swizzles are multiples of


@pytest.fixture(scope="module", params=range(6))
def config(request: pytest.FixtureRequest, whitebox: ModuleType):
    return whitebox.hopper_backward_configs()[request.param]


def test_each_head_dim_has_a_kernel_with_and_one_without_masks(whitebox: ModuleType):
    kernels = [(config.head_dim, config.masked) for config in whitebox.hopper_backward_configs()]
    assert kernels == [(d, masked) for d in (64, 96, 128) for masked in (False, True)]


def test_sums_of_dq_hold_every_element_once(config):
    places = [config.dq_place(index) for index in range(config.dq_floats())]
    assert len(set(places)) == config.dq_floats() == config.tile_m * config.columns()
    assert {query for query, _ in places} == set(range(config.tile_m))
    assert {column for _, column in places} == set(range(config.columns()))


def test_four_sums_in_a_row_are_two_queries_of_two_columns(config):
    """finish_dq takes them in one piece."""
    for first in range(0, config.dq_floats(), 4):
        query, column = config.dq_place(first)
        four = [config.dq_place(first + e) for e in range(4)]
        assert four == [(query + e % 2, column + e // 2 * 8) for e in range(4)]


def test_a_group_adds_its_part_in_one_piece(config):
    """A DqWriter moves the sums of a group's warps at once, and only of those with columns."""
    for group in (0, 1):
        first = group * config.dq_floats() // 2
        part = range(first, first + config.dq_group_bytes(group) // 4)
        assert len(part) == config.dq_warps(group) * 16 * config.dq_queries()
        for index in part:
            query, column = config.dq_place(index)
            assert column < max(config.head_dim, 64)
            assert (
                column // 64 if config.columns() > 64 else query // config.dq_queries()
            ) == group


def test_groups_add_every_column_of_the_head(config):
    places = {
        config.dq_place(group * config.dq_floats() // 2 + index)
        for group in (0, 1)
        for index in range(config.dq_group_bytes(group) // 4)
    }
    assert {column for _, column in places} == set(range(config.head_dim))
    assert len(places) == config.tile_m * config.head_dim


def test_terms_of_a_tile_are_a_permutation_within_16_rows(config):
    places = [config.term_place(row) for row in range(config.tile_m)]
    assert sorted(places) == list(range(config.tile_m))
    assert all(row // 16 == place // 16 for row, place in enumerate(places))


def test_a_thread_reads_the_terms_of_its_columns_in_one_piece(config):
    """Lane 4g + t holds the columns 2t, 2t + 1 of each 8 (csrc/cuda/hopper/backward_tile.cuh)."""
    for t in range(4):
        columns = [8 * e + 2 * t + j for e in range(2) for j in range(2)]
        assert [config.term_place(column) for column in columns] == list(range(4 * t, 4 * t + 4))


def test_tiles_lie_apart_in_shared_memory(config):
    offsets = config.offsets()
    if not config.masked:
        assert offsets.pop(7) == offsets[6]  # no room for sums of dQ: nothing is finished there
    assert offsets == sorted(set(offsets))
    assert offsets[-1] <= SMEM_BYTES
    assert all(offset % SWIZZLED == 0 for offset in offsets[:7])  # K, V, Q, dO, dS, dQ, behind it
    rest = offsets[7 if config.masked else 6 :]
    assert all(offset % 16 == 0 for offset in rest[:3])  # terms, marks, barriers
    assert all(offset % 4 == 0 for offset in rest[3:])
    assert config.terms_bytes() % 16 == 0  # copied in bulk


def plan_of(whitebox: ModuleType, *, B=1, H_kv=1, group=1, S_q, S_kv, D=128, causal, deterministic):
    config = next(
        config
        for config in whitebox.hopper_backward_configs()
        if (config.head_dim, config.masked) == (D, causal)
    )
    alignment = whitebox.Alignment.bottom_right
    mask = whitebox.Mask.causal(S_q, S_kv, alignment) if causal else whitebox.Mask.full(S_kv)
    shape = whitebox.Shape(B=B, H=H_kv * group, H_kv=H_kv, S_q=S_q, S_kv=S_kv, D=D, D_v=D)
    return whitebox.plan_hopper_backward(
        config=config, shape=shape, mask=mask, deterministic=deterministic, multiprocessors=132
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("B", "H_kv", "S_kv"), [(1, 1, 100), (2, 3, 700), (4, 16, 512), (1, 7, 5000), (3, 40, 2100)]
)
def test_key_tiles_of_a_head_begin_in_ascending_order(
    whitebox: ModuleType, causal: bool, D: int, B: int, H_kv: int, S_kv: int
):
    """A block waits for those of the key tiles before its own: they must have begun."""
    plan, ordered, _ = plan_of(
        whitebox, B=B, H_kv=H_kv, S_q=S_kv, S_kv=S_kv, D=D, causal=causal, deterministic=True
    )
    assert ordered
    assert 1 <= plan.section_heads <= plan.heads
    begun = dict.fromkeys(((b, h) for b in range(B) for h in range(H_kv)), 0)
    for index in range(plan.blocks()):
        at = plan.locate(index)
        assert at.kv_tile == begun[at.b, at.h_kv]
        begun[at.b, at.h_kv] += 1
    assert set(begun.values()) == {plan.kv_tiles}


@pytest.mark.parametrize("left", [None, 0, 130, 500])
@pytest.mark.parametrize("right", [None, 0, 70])
@pytest.mark.parametrize(("S_q", "S_kv"), [(500, 500), (1000, 300), (90, 700), (64, 128)])
def test_adders_are_the_key_tiles_that_step_through_a_query_tile(
    whitebox: ModuleType, S_q: int, S_kv: int, left: int | None, right: int | None
):
    plan, *_ = plan_of(whitebox, S_q=S_q, S_kv=S_kv, causal=True, deterministic=True)
    sides = [2**31 - 1 if side is None else side for side in (left, right)]
    mask = whitebox.Mask.window(S_q, S_kv, whitebox.Alignment.bottom_right, *sides)
    shape = whitebox.Shape(B=1, H=1, H_kv=1, S_q=S_q, S_kv=S_kv, D=128, D_v=128)
    adders: dict[int, list[int]] = {q_tile: [] for q_tile in range(plan.q_tiles)}
    for kv_tile in range(plan.kv_tiles):  # as set_key_tile finds the steps
        queries = mask.q_range(kv_tile * plan.tile_n, (kv_tile + 1) * plan.tile_n, S_q)
        if queries.size() > 0:
            for q_tile in range(queries.begin // plan.tile_m, -(-queries.end // plan.tile_m)):
                adders[q_tile].append(kv_tile)
    for q_tile, due in adders.items():
        found = whitebox.hopper_adders_of(plan, shape, mask, q_tile)
        assert due == list(range(*found))


@pytest.mark.parametrize(
    ("S_kv", "D", "group", "causal", "due"),
    [
        (1024, 128, 1, False, True),
        (1025, 128, 1, False, False),
        (512, 128, 8, False, True),
        (513, 128, 8, False, False),
        (1024, 128, 1, True, True),
        (1025, 128, 1, True, False),
        (512, 64, 1, True, True),
        (513, 64, 1, True, False),
        (4096, 128, 8, True, True),
        (4097, 128, 8, True, False),
    ],
)
def test_short_calls_add_in_order(
    whitebox: ModuleType, S_kv: int, D: int, group: int, causal: bool, due: bool
):
    call = {"H_kv": 2, "group": group, "S_q": S_kv, "S_kv": S_kv, "D": D, "causal": causal}
    assert plan_of(whitebox, **call, deterministic=False)[1] is due
    assert plan_of(whitebox, **call, deterministic=True)[1] is True


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("H_kv", "S_kv"), [(1, 400), (40, 400), (3, 2000), (40, 2000)])
def test_blocks_stay_and_take_key_tiles_in_turns(
    whitebox: ModuleType, H_kv: int, S_kv: int, deterministic: bool, D: int, causal: bool
):
    plan, _, blocks = plan_of(
        whitebox, H_kv=H_kv, S_q=300, S_kv=S_kv, D=D, causal=causal, deterministic=deterministic
    )
    tiles = H_kv * -(-S_kv // 128)
    assert plan.blocks() == tiles
    assert blocks == min(tiles, 132)
