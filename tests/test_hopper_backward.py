# SPDX-License-Identifier: BSD-3-Clause
"""The layouts of the Hopper backward kernel (csrc/cuda/hopper/backward_config.h): what its threads
write in one order another kernel reads in another.
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
            assert (column // 64 if config.columns() > 64 else query // config.dq_queries()) == group


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
    assert offsets == sorted(set(offsets))
    assert offsets[-1] <= SMEM_BYTES
    assert all(offset % SWIZZLED == 0 for offset in offsets[:7])  # K, V, Q, dO, dS, dQ, its sums
    assert all(offset % 16 == 0 for offset in offsets[7:10])  # terms, marks, barriers
    assert all(offset % 4 == 0 for offset in offsets[10:])
    assert config.terms_bytes() % 16 == 0  # copied in bulk
