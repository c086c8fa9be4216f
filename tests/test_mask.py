# SPDX-License-Identifier: BSD-3-Clause
"""Mask (csrc/core/mask.h) against the sentence that defines it, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

INT32_MAX = 2**31 - 1
UNBOUNDED = INT32_MAX
ALIGNMENTS = ["top_left", "bottom_right"]


@dataclass(frozen=True)
class Band:
    """A mask by its definition, in Python's unlimited integers."""

    s_q: int
    s_kv: int
    alignment: str
    left: int
    right: int

    def built(self, whitebox: ModuleType):
        alignment = getattr(whitebox.Alignment, self.alignment)
        return whitebox.Mask.window(self.s_q, self.s_kv, alignment, self.left, self.right)

    def sees(self, q_idx: int, kv_idx: int) -> bool:
        diagonal = q_idx + (self.s_kv - self.s_q if self.alignment == "bottom_right" else 0)
        return (
            0 <= kv_idx < self.s_kv
            and (self.left == UNBOUNDED or kv_idx >= diagonal - self.left)
            and (self.right == UNBOUNDED or kv_idx <= diagonal + self.right)
        )

    def row(self, q_idx: int) -> tuple[int, int]:
        """The keys query q_idx sees, as a half-open range; (0, 0) if none."""
        diagonal = q_idx + (self.s_kv - self.s_q if self.alignment == "bottom_right" else 0)
        begin = 0 if self.left == UNBOUNDED else max(0, diagonal - self.left)
        end = self.s_kv if self.right == UNBOUNDED else min(self.s_kv, diagonal + self.right + 1)
        return (begin, end) if begin < end else (0, 0)

    def column(self, kv_idx: int) -> tuple[int, int]:
        """The queries that see key kv_idx, as a half-open range; (0, 0) if none."""
        diagonal = kv_idx - (self.s_kv - self.s_q if self.alignment == "bottom_right" else 0)
        begin = 0 if self.right == UNBOUNDED else max(0, diagonal - self.right)
        end = self.s_q if self.left == UNBOUNDED else min(self.s_q, diagonal + self.left + 1)
        return (begin, end) if begin < end else (0, 0)


def lengths(largest: int):
    return st.integers(0, largest)


def sides(largest: int):
    return st.one_of(st.just(UNBOUNDED), st.integers(0, largest))


SMALL = st.builds(
    Band,
    s_q=lengths(20),
    s_kv=lengths(20),
    alignment=st.sampled_from(ALIGNMENTS),
    left=sides(24),
    right=sides(24),
)
HUGE_LENGTH = st.one_of(st.integers(1, 100), st.integers(INT32_MAX - 100, INT32_MAX))
HUGE_SIDE = st.one_of(sides(100), st.integers(INT32_MAX - 100, INT32_MAX))
HUGE = st.builds(
    Band,
    s_q=HUGE_LENGTH,
    s_kv=HUGE_LENGTH,
    alignment=st.sampled_from(ALIGNMENTS),
    left=HUGE_SIDE,
    right=HUGE_SIDE,
)


def test_unbounded_is_the_largest_int32(whitebox: ModuleType):
    assert whitebox.UNBOUNDED == UNBOUNDED


@given(band=SMALL)
def test_visible_is_the_definition(whitebox: ModuleType, band: Band):
    mask = band.built(whitebox)
    for q_idx in range(band.s_q):
        for kv_idx in range(-2, band.s_kv + 3):
            assert mask.visible(q_idx, kv_idx) == band.sees(q_idx, kv_idx), (q_idx, kv_idx)


@given(band=SMALL)
def test_range_of_one_query_is_the_set_it_sees(whitebox: ModuleType, band: Band):
    mask = band.built(whitebox)
    for q_idx in range(band.s_q):
        kv = mask.kv_range(q_idx, q_idx + 1)
        seen = [kv_idx for kv_idx in range(band.s_kv) if band.sees(q_idx, kv_idx)]
        assert list(range(kv.begin, kv.end)) == seen
        assert kv.size() == len(seen)


@given(band=SMALL, begin=st.integers(0, 20), rows=st.integers(1, 9))
def test_range_of_a_tile_is_the_hull_of_its_rows(
    whitebox: ModuleType, band: Band, begin: int, rows: int
):
    # The last tile may reach past s_q: rows there follow the same band.
    kv = band.built(whitebox).kv_range(begin, begin + rows)
    seen = [
        kv_idx
        for kv_idx in range(band.s_kv)
        if any(band.sees(q_idx, kv_idx) for q_idx in range(begin, begin + rows))
    ]
    if seen:
        assert (kv.begin, kv.end) == (seen[0], seen[-1] + 1)
    else:
        assert kv.size() == 0


@given(band=SMALL, begin=st.integers(0, 20), keys=st.integers(1, 9))
def test_queries_of_keys_are_the_hull_of_those_that_see_one(
    whitebox: ModuleType, band: Band, begin: int, keys: int
):
    # The last tile may reach past s_kv: keys there do not exist.
    queries = band.built(whitebox).q_range(begin, begin + keys, band.s_q)
    seeing = [
        q_idx
        for q_idx in range(band.s_q)
        if any(band.sees(q_idx, kv_idx) for kv_idx in range(begin, begin + keys))
    ]
    if seeing:
        assert (queries.begin, queries.end) == (seeing[0], seeing[-1] + 1)
    else:
        assert queries.size() == 0


@given(band=SMALL)
def test_queries_of_one_key_are_the_set_that_sees_it(whitebox: ModuleType, band: Band):
    mask = band.built(whitebox)
    for kv_idx in range(band.s_kv + 2):
        queries = mask.q_range(kv_idx, kv_idx + 1, band.s_q)
        seeing = [q_idx for q_idx in range(band.s_q) if band.sees(q_idx, kv_idx)]
        assert list(range(queries.begin, queries.end)) == seeing
        assert queries.size() == len(seeing)


@given(
    band=SMALL,
    q_begin=st.integers(0, 20),
    rows=st.integers(1, 9),
    kv_begin=st.integers(0, 20),
    keys=st.integers(1, 9),
)
def test_tile_needs_mask_exactly_if_a_pair_is_hidden(
    whitebox: ModuleType, band: Band, q_begin: int, rows: int, kv_begin: int, keys: int
):
    hidden = any(
        not band.sees(q_idx, kv_idx)
        for q_idx in range(q_begin, q_begin + rows)
        for kv_idx in range(kv_begin, kv_begin + keys)
    )
    mask = band.built(whitebox)
    assert mask.tile_needs_mask(q_begin, q_begin + rows, kv_begin, kv_begin + keys) == hidden


@given(band=HUGE, data=st.data())
@example(band=Band(INT32_MAX, 1, "bottom_right", 0, 0), data=None)
@example(band=Band(1, INT32_MAX, "bottom_right", 0, 0), data=None)
@example(band=Band(INT32_MAX, INT32_MAX, "top_left", INT32_MAX - 1, INT32_MAX - 1), data=None)
@example(band=Band(INT32_MAX, 1, "bottom_right", INT32_MAX - 1, 0), data=None)
@example(band=Band(1, INT32_MAX, "bottom_right", 0, INT32_MAX - 1), data=None)
def test_lengths_and_windows_near_the_limit_of_int32(whitebox: ModuleType, band: Band, data):
    mask = band.built(whitebox)
    rows = {0, 1, band.s_q // 2, band.s_q - 2, band.s_q - 1}
    if data is not None:
        rows.add(data.draw(st.integers(0, band.s_q - 1)))
    for q_idx in sorted(row for row in rows if 0 <= row < band.s_q):
        kv = mask.kv_range(q_idx, q_idx + 1)
        begin, end = band.row(q_idx)
        assert (kv.begin, kv.end) == (begin, end), q_idx
        for kv_idx in (0, begin - 1, begin, end - 1, end, band.s_kv - 1):
            if 0 <= kv_idx < INT32_MAX:
                assert mask.visible(q_idx, kv_idx) == band.sees(q_idx, kv_idx), (q_idx, kv_idx)


@given(band=HUGE, data=st.data())
def test_queries_of_a_key_near_the_limit_of_int32(whitebox: ModuleType, band: Band, data):
    mask = band.built(whitebox)
    keys = {0, 1, band.s_kv // 2, band.s_kv - 2, band.s_kv - 1}
    keys.add(data.draw(st.integers(0, band.s_kv - 1)))
    for kv_idx in sorted(key for key in keys if 0 <= key < band.s_kv):
        queries = mask.q_range(kv_idx, kv_idx + 1, band.s_q)
        assert (queries.begin, queries.end) == band.column(kv_idx), kv_idx


@given(band=HUGE)
def test_tile_needs_mask_near_the_limit_of_int32(whitebox: ModuleType, band: Band):
    mask = band.built(whitebox)
    q_begin, q_end = max(0, band.s_q - 128), band.s_q
    kv_begin, kv_end = max(0, band.s_kv - 128), band.s_kv
    # A band is convex, so a tile is fully visible if its two extreme corners are.
    corners = [(q_begin, kv_end - 1), (q_end - 1, kv_begin)]
    hidden = not all(band.sees(q_idx, kv_idx) for q_idx, kv_idx in corners)
    assert mask.tile_needs_mask(q_begin, q_end, kv_begin, kv_end) == hidden


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("s_q", "s_kv"), [(5, 5), (3, 8), (8, 3), (1, 7), (7, 1), (4, 0), (0, 4)])
def test_causal_is_a_window_without_left_bound(
    whitebox: ModuleType, alignment: str, s_q: int, s_kv: int
):
    causal = whitebox.Mask.causal(s_q, s_kv, getattr(whitebox.Alignment, alignment))
    offset = s_kv - s_q if alignment == "bottom_right" else 0
    for q_idx in range(s_q):
        for kv_idx in range(s_kv):
            assert causal.visible(q_idx, kv_idx) == (kv_idx <= q_idx + offset)


def test_more_queries_than_keys_leave_the_first_rows_without_a_key(whitebox: ModuleType):
    causal = whitebox.Mask.causal(8, 3, whitebox.Alignment.bottom_right)
    assert [causal.kv_range(q, q + 1).size() for q in range(8)] == [0, 0, 0, 0, 0, 1, 2, 3]


def test_full_mask_hides_nothing(whitebox: ModuleType):
    full = whitebox.Mask.full(7)
    assert not full.is_banded()
    assert all(full.visible(q_idx, kv_idx) for q_idx in (0, 6, 2**30) for kv_idx in range(7))
    assert not full.tile_needs_mask(0, 64, 0, 7)
    assert full.tile_needs_mask(0, 64, 0, 8)


@pytest.mark.parametrize(("left", "right"), [(0, UNBOUNDED), (UNBOUNDED, 0), (3, 4)])
def test_bounded_side_makes_a_band(whitebox: ModuleType, left: int, right: int):
    mask = whitebox.Mask.window(5, 5, whitebox.Alignment.top_left, left, right)
    assert mask.is_banded()
