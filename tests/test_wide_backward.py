# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper backward kernel for wide heads: its layouts (csrc/cuda/hopper/wide_backward_config.h),
what its threads write in one order another kernel reads in another. Gradients: test_gradients.py.
"""

from __future__ import annotations

from types import ModuleType

import pytest

SMEM_BYTES = 227 * 1024  # what a block may have
SWIZZLED = 1024  # what tiles that the copy engine swizzles are multiples of
TILE_M = 64


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
