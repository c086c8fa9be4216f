# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper backward kernel for wide heads: its layouts (csrc/cuda/hopper/wide_backward_config.h),
what its threads write in one order another kernel reads in another, and its plan. Gradients:
test_gradients.py, test_hopper_dq.py.
"""

from __future__ import annotations

from types import ModuleType

import pytest

SMEM_BYTES = 227 * 1024  # what a block may have
SWIZZLED = 1024  # what tiles that the copy engine swizzles are multiples of
TILE_M = 64
CLUSTER_KEYS = 128


@pytest.fixture(scope="module", params=range(6))
def config(request: pytest.FixtureRequest, whitebox: ModuleType):
    return whitebox.wide_backward_configs()[request.param]


def test_each_pair_of_head_dims_has_a_kernel_with_and_one_without_masks(whitebox: ModuleType):
    kernels = [(c.head_dim, c.value_dim, c.masked) for c in whitebox.wide_backward_configs()]
    dims = [(192, 128), (192, 192), (256, 256)]
    assert kernels == [(*pair, masked) for pair in dims for masked in (False, True)]


def test_sums_of_dq_hold_every_element_once(config):
    places = [config.dq_place(index) for index in range(config.dq_floats())]
    assert len(set(places)) == config.dq_floats() == TILE_M * config.head_dim
    assert {query for query, _ in places} == set(range(TILE_M))
    assert {column for _, column in places} == set(range(config.head_dim))


def test_four_sums_in_a_row_are_two_columns_of_two_queries(config):
    """The finishing kernel takes them in one piece."""
    for first in range(0, config.dq_floats(), 4):
        query, column = config.dq_place(first)
        four = [config.dq_place(first + e) for e in range(4)]
        assert four == [(query + e // 2 * 8, column + e % 2) for e in range(4)]


def test_a_warp_adds_128_floats_in_a_row(config):
    """Lane 4g + t holds rows g, g + 8 and columns 2t, 2t + 1 (csrc/cuda/hopper/product.cuh)."""
    for first in range(0, config.dq_floats(), 128):
        query, column = config.dq_place(first)
        for lane in range(32):
            assert config.dq_place(first + 4 * lane) == (query + lane // 4, column + lane % 4 * 2)


def test_tiles_lie_apart_in_shared_memory(config):
    offsets = config.offsets()
    assert offsets == sorted(set(offsets))
    assert offsets[-1] <= SMEM_BYTES
    assert all(offset % SWIZZLED == 0 for offset in offsets[:8])  # tiles; terms
    assert all(offset % 16 == 0 for offset in offsets[8:-1])


def plan_of(
    whitebox: ModuleType,
    *,
    B: int = 1,
    H_kv: int = 2,
    group: int = 1,
    S_kv: int,
    causal: bool,
    deterministic: bool,
    multiprocessors: int = 132,
):
    alignment = whitebox.Alignment.bottom_right
    mask = whitebox.Mask.causal(S_kv, S_kv, alignment) if causal else whitebox.Mask.full(S_kv)
    shape = whitebox.Shape(B=B, H=H_kv * group, H_kv=H_kv, S_q=S_kv, S_kv=S_kv, D=256, D_v=256)
    return whitebox.plan_wide_backward(
        shape=shape, mask=mask, deterministic=deterministic, multiprocessors=multiprocessors
    )


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("multiprocessors", [2, 78, 132])
@pytest.mark.parametrize(
    ("B", "H_kv", "S_kv"), [(1, 1, 100), (2, 3, 700), (4, 16, 512), (1, 7, 5000), (3, 40, 2100)]
)
def test_key_tiles_of_a_head_begin_in_ascending_order(
    whitebox: ModuleType,
    group: int,
    causal: bool,
    multiprocessors: int,
    B: int,
    H_kv: int,
    S_kv: int,
):
    """A cluster waits for those of the key tiles before its own: they must have begun."""
    plan, ordered = plan_of(
        whitebox,
        B=B,
        H_kv=H_kv,
        group=group,
        S_kv=S_kv,
        causal=causal,
        deterministic=True,
        multiprocessors=multiprocessors,
    )
    assert ordered
    assert (plan.tile_m, plan.tile_n) == (TILE_M, CLUSTER_KEYS)
    assert 1 <= plan.section_heads <= plan.heads
    begun = dict.fromkeys(((b, h) for b in range(B) for h in range(H_kv)), 0)
    for index in range(plan.blocks()):
        at = plan.locate(index)
        assert at.kv_tile == begun[at.b, at.h_kv]
        begun[at.b, at.h_kv] += 1
    assert set(begun.values()) == {plan.kv_tiles}


@pytest.mark.parametrize("B", [1, 200])  # no gradient depends on the batch
@pytest.mark.parametrize(
    ("S_kv", "group", "causal", "due"),
    [
        (512, 1, False, True),
        (513, 1, False, False),
        (512, 4, False, True),
        (513, 4, False, False),
        (1024, 1, True, True),
        (1025, 1, True, False),
        (8192, 2, True, True),
        (8193, 2, True, False),
    ],
)
def test_short_calls_add_in_order(
    whitebox: ModuleType, B: int, S_kv: int, group: int, causal: bool, due: bool
):
    call = {"B": B, "group": group, "S_kv": S_kv, "causal": causal}
    assert plan_of(whitebox, **call, deterministic=False)[1] is due
    assert plan_of(whitebox, **call, deterministic=True)[1] is True
