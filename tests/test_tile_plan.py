# SPDX-License-Identifier: BSD-3-Clause
"""TilePlan (csrc/cuda/tile_plan.h) against what it stands for: every query row meets every key it
sees in exactly one thread block for each block of output columns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

UNBOUNDED = 2**31 - 1
MAX_LENGTH = 2**31 - 1024
MAX_HEADS = 2**31 - 1  # B * H
MAX_TILES = 2**31 - 1
MAX_PACK = 4096
ELEMENT_BYTES = {"f16": 2, "f32": 4, "f64": 8}
CACHE_BYTES = 40 * 10**6  # the smallest L2 cache that sections are made for


@dataclass(frozen=True)
class Call:
    """One call of a runner. The mask has no sides by default."""

    B: int = 1
    H_kv: int = 1
    group: int = 1
    S_q: int = 1
    S_kv: int = 1
    D: int = 64  # and D_v
    dtype: str = "f16"
    alignment: str = "top_left"
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    batch_invariant: bool = False
    m: int = 64
    n: int = 64
    column_blocks: int = 1
    blocks_per_sm: int = 2
    multiprocessors: int = 108

    @property
    def heads(self) -> int:
        return self.H_kv * self.group

    @property
    def pack(self) -> int:
        return self.group if self.S_q < self.m and self.group <= MAX_PACK else 1

    @property
    def q_tiles(self) -> int:
        return -(-self.S_q * self.pack // self.m)

    def mask(self, whitebox: ModuleType):
        alignment = getattr(whitebox.Alignment, self.alignment)
        return whitebox.Mask.window(self.S_q, self.S_kv, alignment, self.left, self.right)

    def args(self, whitebox: ModuleType):
        B, H, H_kv, S_q, S_kv, D = self.B, self.heads, self.H_kv, self.S_q, self.S_kv, self.D
        return whitebox.ForwardArgs(
            dtype=getattr(whitebox.DType, self.dtype),
            shape=whitebox.Shape(B=B, H=H, H_kv=H_kv, S_q=S_q, S_kv=S_kv, D=D, D_v=D),
            mask=self.mask(whitebox),
            batch_invariant=self.batch_invariant,
        )

    def plan(self, whitebox: ModuleType):
        names = ("m", "n", "column_blocks", "blocks_per_sm")
        tile = whitebox.TileShape(**{name: getattr(self, name) for name in names})
        return whitebox.plan_tiles(self.args(whitebox), tile, self.multiprocessors)

    def queries(self, q_tile: int) -> tuple[int, int]:
        """The queries of a tile's rows, without the rows behind the last query, [begin, end)."""
        last_row = min((q_tile + 1) * self.m, self.S_q * self.pack) - 1
        return q_tile * self.m // self.pack, last_row // self.pack + 1


def sides(largest: int):
    return st.one_of(st.just(UNBOUNDED), st.just(0), st.integers(0, largest))


TILES = {
    "m": st.sampled_from([16, 48, 64, 128, 192, 256]),
    "n": st.sampled_from([16, 32, 48, 64, 128]),
    "column_blocks": st.integers(1, 3),
    "blocks_per_sm": st.integers(1, 4),
    "multiprocessors": st.one_of(st.integers(1, 4), st.sampled_from([40, 108, 132, 200])),
}
SMALL = st.builds(
    Call,
    B=st.integers(1, 4),
    H_kv=st.integers(1, 3),
    group=st.integers(1, 6),
    S_q=st.one_of(st.integers(1, 20), st.integers(1, 600)),
    S_kv=st.one_of(st.integers(0, 20), st.integers(0, 900), st.integers(2000, 9000)),
    D=st.sampled_from([1, 64, 1000, 8000, 60_000]),
    dtype=st.sampled_from(sorted(ELEMENT_BYTES)),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
    left=sides(700),
    right=sides(700),
    batch_invariant=st.booleans(),
    **TILES,
)


@st.composite
def huge_calls(draw):
    """Sizes at and near what the callers allow."""
    length = st.one_of(st.integers(1, 300), st.integers(MAX_LENGTH - 300, MAX_LENGTH))
    side = st.one_of(sides(300), st.integers(UNBOUNDED - 300, UNBOUNDED))
    group = draw(st.sampled_from([1, 2, 5, 4095, 4096, 4097, 2**20, MAX_HEADS]))
    most = MAX_HEADS // group
    H_kv = draw(st.one_of(st.integers(1, min(4, most)), st.integers(1, most), st.just(most)))
    most = MAX_HEADS // (group * H_kv)
    return Call(
        B=draw(st.one_of(st.integers(1, min(4, most)), st.integers(1, most), st.just(most))),
        H_kv=H_kv,
        group=group,
        S_q=draw(length),
        S_kv=draw(st.one_of(st.just(0), length)),
        D=draw(st.sampled_from([1, 64, 256])),
        dtype=draw(st.sampled_from(sorted(ELEMENT_BYTES))),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        left=draw(side),
        right=draw(side),
        batch_invariant=draw(st.booleans()),
        **{name: draw(strategy) for name, strategy in TILES.items()},
    )


# Twelve heads in sections of five, the last of two: 32 MiB hold the keys and values of five.
SECTIONS = Call(B=3, H_kv=4, S_q=300, S_kv=3000, D=512, right=0, column_blocks=2)
SPLITS = Call(B=2, H_kv=2, group=3, S_q=5, S_kv=9000, column_blocks=2)
INVARIANT_SPLITS = replace(SPLITS, batch_invariant=True)


def located(plan, locate: str = "locate") -> list[tuple[int, int, int, int, int]]:
    """Where the method of that name puts each tile."""
    coords = (getattr(plan, locate)(i) for i in range(plan.tiles()))
    return [(at.b, at.h, at.q_tile, at.split, at.column_block) for at in coords]


def index_of(plan, call: Call, at) -> int:
    """The inverse of locate: column blocks vary fastest, then splits, the heads of a section, its
    query tiles (later ones first), sections.
    """
    head = (at.b * call.heads + at.h) // call.pack
    section = head // plan.section_heads * plan.section_heads
    section_heads = min(plan.section_heads, plan.heads - section)
    index = section * plan.q_tiles
    index += (plan.q_tiles - 1 - at.q_tile) * section_heads + head - section
    return (index * plan.splits + at.split) * plan.column_blocks + at.column_block


def keys_of_splits(plan, mask, q_tile: int, whitebox: ModuleType) -> list[tuple[int, int]]:
    ranges = [
        plan.keys(mask, whitebox.TileCoord(q_tile=q_tile, split=split))
        for split in range(plan.splits)
    ]
    return [(keys.begin, keys.end) for keys in ranges if keys.size() > 0]


def check_chain(ranges: list[tuple[int, int]], begin: int, end: int, n: int) -> None:
    """The ranges follow one another from `begin` to `end`, each from a multiple of n on."""
    assert all(keys[0] % n == 0 for keys in ranges)
    ends = [begin] + [keys[1] for keys in ranges]
    assert [keys[0] for keys in ranges] == ends[:-1]
    assert ends[-1] == end


def test_the_limits_are_those_of_the_header(whitebox: ModuleType):
    assert whitebox.MAX_LENGTH == MAX_LENGTH
    assert whitebox.TilePlan.kMaxTiles == MAX_TILES
    assert whitebox.TilePlan.kMaxPack == MAX_PACK


def test_the_examples_have_sections_and_splits(whitebox: ModuleType):
    plan = SECTIONS.plan(whitebox)
    assert (plan.heads, plan.section_heads) == (12, 5)
    for call in (SPLITS, INVARIANT_SPLITS):
        plan = call.plan(whitebox)
        assert plan.pack == 3
        assert plan.splits > 1


@given(call=SMALL)
@example(call=SECTIONS)
@example(call=SPLITS)
@example(call=INVARIANT_SPLITS)
def test_locate_reaches_every_tile_once(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    assert plan.tiles() == call.B * call.heads // call.pack * call.q_tiles * (
        plan.splits * call.column_blocks
    )
    expected = itertools.product(
        range(call.B),
        range(0, call.heads, call.pack),
        range(call.q_tiles),
        range(plan.splits),
        range(call.column_blocks),
    )
    assert sorted(located(plan)) == list(expected)


@given(call=SMALL)
@example(call=SECTIONS)
@example(call=replace(SECTIONS, right=UNBOUNDED))
@example(call=SPLITS)
def test_later_query_tiles_come_first_within_a_section(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    order = [
        ((b * call.heads + h) // call.pack // plan.section_heads, -q_tile)
        for b, h, q_tile, _, _ in located(plan)
    ]
    assert order == sorted(order)


@given(call=SMALL)
@example(call=SECTIONS)
def test_the_heads_of_a_section_fit_the_cache(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    banded = (call.left, call.right) != (UNBOUNDED, UNBOUNDED)
    assert 1 <= plan.section_heads <= (plan.heads if banded else 1)
    heads_kv = plan.section_heads * call.pack / call.group
    elements = heads_kv * call.S_kv * 2 * call.D
    assert plan.section_heads == 1 or elements * ELEMENT_BYTES[call.dtype] <= CACHE_BYTES


@given(call=SMALL)
@example(call=SPLITS)
@example(call=INVARIANT_SPLITS)
@example(call=Call(S_kv=600 * 64, multiprocessors=3))
def test_no_split_lies_behind_the_keys(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    assert plan.keys_per_split % call.n == 0
    assert (plan.splits - 1) * plan.keys_per_split <= max(0, call.S_kv - 1)
    assert call.S_kv <= plan.splits * plan.keys_per_split
    if plan.splits > 1 and not call.batch_invariant:  # they only fill a device that is not full
        assert plan.tiles() <= call.multiprocessors * call.blocks_per_sm


@given(
    m=TILES["m"],
    S_q=st.integers(1, 255),
    group=st.one_of(st.integers(1, 16), st.integers(1, 5000), st.sampled_from([4095, 4096, 4097])),
)
def test_a_row_is_a_query_of_a_head(whitebox: ModuleType, m: int, S_q: int, group: int):
    call = Call(group=group, S_q=S_q, m=m)
    plan = call.plan(whitebox)
    assert (plan.pack, plan.rows, plan.group) == (call.pack, S_q * call.pack, group)
    assert plan.q_tiles == call.q_tiles
    assert plan.first_wrong_query() is None


@pytest.mark.parametrize("S_q", [1, 2, 3, 255])
def test_rows_of_every_group_that_is_packed(whitebox: ModuleType, S_q: int):
    for group in range(1, MAX_PACK + 2):
        plan = Call(group=group, S_q=S_q, m=256).plan(whitebox)
        assert plan.pack == (group if group <= MAX_PACK else 1)
        assert plan.first_wrong_query() is None, group


@given(call=SMALL)
@example(call=SPLITS)
def test_query_range_is_that_of_the_rows(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    for q_tile in range(plan.q_tiles):
        assert (plan.query_begin(q_tile), plan.query_end(q_tile)) == call.queries(q_tile)


@given(call=SMALL)
@example(call=SECTIONS)
@example(call=SPLITS)
@example(call=INVARIANT_SPLITS)
@example(call=replace(SPLITS, alignment="bottom_right", right=0))
@example(call=replace(SPLITS, alignment="bottom_right", left=1000, right=0))
@example(call=replace(SPLITS, right=0))
@example(call=Call(S_q=500, S_kv=70, alignment="bottom_right", right=0))
@example(call=Call(S_q=500, S_kv=70, left=5, right=5))
@example(call=Call(S_q=70, S_kv=0, right=0))
def test_every_seen_key_tile_is_read_once(whitebox: ModuleType, call: Call):
    plan, mask = call.plan(whitebox), call.mask(whitebox)
    for q_tile in range(call.q_tiles):
        rows = [mask.kv_range(q_idx, q_idx + 1) for q_idx in range(*call.queries(q_tile))]
        rows = [keys for keys in rows if keys.size() > 0]
        ranges = keys_of_splits(plan, mask, q_tile, whitebox)
        if not rows:
            assert ranges == []
            continue
        first = min(keys.begin for keys in rows)
        check_chain(ranges, first - first % call.n, max(keys.end for keys in rows), call.n)

        read = [begin for keys in ranges for begin in range(*keys, call.n)]
        seen = {
            kv_begin
            for keys in rows
            for kv_begin in range(keys.begin - keys.begin % call.n, keys.end, call.n)
        }
        assert read == sorted(seen)


def test_ranges_at_the_borders_of_splits(whitebox: ModuleType):
    call = Call(S_kv=9000)
    plan = call.plan(whitebox)
    assert plan.splits > 3
    steps = (-call.n, -1, 0, 1, call.n)
    near = {max(0, i * plan.keys_per_split + step) for i in range(3) for step in steps}
    for begin, end in itertools.combinations(sorted(near), 2):
        mask = whitebox.Mask.window(1, end, whitebox.Alignment.bottom_right, end - 1 - begin, 0)
        ranges = keys_of_splits(plan, mask, 0, whitebox)
        check_chain(ranges, begin - begin % call.n, end, call.n)


def within_head(plan) -> list[list[tuple[int, int, int]]]:
    """The tiles of the first and the last head, in the order in which their blocks start."""
    tiles = located(plan)
    heads = [min(tile[:2] for tile in tiles), max(tile[:2] for tile in tiles)]
    return [[tile[2:] for tile in tiles if tile[:2] == head] for head in heads]


@given(call=SMALL, B=st.integers(1, 6), H_kv=st.integers(1, 6), sms=TILES["multiprocessors"])
@example(call=INVARIANT_SPLITS, B=5, H_kv=6, sms=1)
@example(call=replace(SECTIONS, batch_invariant=True), B=1, H_kv=1, sms=200)
def test_batch_invariant_plans_do_not_see_the_batch(
    whitebox: ModuleType, call: Call, B: int, H_kv: int, sms: int
):
    call = replace(call, batch_invariant=True)
    one = call.plan(whitebox)
    other = replace(call, B=B, H_kv=H_kv, multiprocessors=sms).plan(whitebox)
    for name in ("pack", "rows", "q_tiles", "splits", "keys_per_split"):
        assert getattr(one, name) == getattr(other, name), name
    first, *rest = within_head(one) + within_head(other)
    assert all(order == first for order in rest)


def test_other_plans_do(whitebox: ModuleType):
    splits = [replace(SPLITS, B=B).plan(whitebox).splits for B in (1, 1000)]
    assert splits[0] > splits[1] == 1


@given(call=huge_calls(), data=st.data())
@example(call=Call(B=MAX_HEADS, S_kv=MAX_LENGTH, right=0), data=None)
@example(call=Call(H_kv=MAX_HEADS, S_q=MAX_LENGTH, S_kv=MAX_LENGTH, right=0), data=None)
@example(call=Call(H_kv=2**19 - 1, group=4096, S_q=15, m=16, batch_invariant=True), data=None)
@example(call=Call(S_q=MAX_LENGTH, S_kv=MAX_LENGTH, m=16, n=16, right=0), data=None)
def test_plans_at_the_limits(whitebox: ModuleType, call: Call, data: st.DataObject | None):
    plan, mask = call.plan(whitebox), call.mask(whitebox)
    assert (plan.pack, plan.rows) == (call.pack, call.S_q * call.pack)
    assert (plan.q_tiles, plan.heads) == (call.q_tiles, call.B * call.heads // call.pack)
    assert 1 <= plan.section_heads <= plan.heads
    assert plan.section_heads * plan.q_tiles < 2**32  # locate computes it in 32 bits
    assert plan.tiles() == plan.heads * plan.q_tiles * plan.splits * plan.column_blocks

    def some(size: int) -> set[int]:
        inner = data.draw(st.integers(0, size - 1)) if data else size // 2
        return {0, inner, size - 1}

    for q_tile in some(plan.q_tiles):
        queries = call.queries(q_tile)
        assert (plan.query_begin(q_tile), plan.query_end(q_tile)) == queries
        seen = mask.kv_range(*queries)
        ranges = keys_of_splits(plan, mask, q_tile, whitebox)
        if seen.size() == 0:
            assert ranges == []
        else:
            check_chain(ranges, seen.begin - seen.begin % call.n, seen.end, call.n)
    if plan.tiles() > MAX_TILES:
        return  # launch() refuses it
    for index in some(plan.tiles()):
        at = plan.locate(index)
        assert 0 <= at.b < call.B
        assert at.h in range(0, call.heads, call.pack)
        assert 0 <= at.q_tile < plan.q_tiles
        assert 0 <= at.split < plan.splits
        assert 0 <= at.column_block < plan.column_blocks
        assert index_of(plan, call, at) == index


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("call", "tiles"),
    [
        (Call(B=MAX_HEADS), MAX_TILES),  # the largest plan that can be launched
        (Call(B=MAX_HEADS, column_blocks=2), 2 * MAX_TILES),
        (Call(H_kv=2**16, B=2**15 - 1, S_q=65), 2 * 2**16 * (2**15 - 1)),
        (Call(H_kv=64, S_q=MAX_LENGTH), 2**31 - 1024),
        (Call(H_kv=65, S_q=MAX_LENGTH), 65 * (2**25 - 16)),
    ],
)
def test_plans_with_too_many_tiles_are_seen(
    whitebox: ModuleType, call: Call, tiles: int, batch_invariant: bool
):
    plan = replace(call, batch_invariant=batch_invariant).plan(whitebox)
    assert plan.tiles() == tiles
    assert (plan.tiles() > whitebox.TilePlan.kMaxTiles) == (tiles > 2**31 - 1)
