# SPDX-License-Identifier: BSD-3-Clause
"""BackwardPlan (csrc/cuda/backward_plan.h) against what it stands for: every key tile has one
thread block, and the blocks that add to the same dQ can do so in the order of their key tiles.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

UNBOUNDED = 2**31 - 1
MAX_LENGTH = 2**31 - 1024
MAX_HEADS = 2**31 - 1  # B * H
MAX_BLOCKS = 2**31 - 1  # launch() refuses more
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
CACHE_BYTES = 40 * 10**6  # the smallest L2 cache that sections are made for
BLOCKS_PER_MULTIPROCESSOR = 4  # that a section has at least
MAX_SECTION_BLOCKS = 2**30  # of which a section may fall short of them


@dataclass(frozen=True)
class Call:
    """One call of the runner. The mask has no sides by default."""

    B: int = 1
    H_kv: int = 1
    group: int = 1
    S_q: int = 1
    S_kv: int = 1
    D: int = 64
    D_v: int = 64
    dtype: str = "f16"
    alignment: str = "top_left"
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    m: int = 64
    n: int = 64
    multiprocessors: int = 108

    @property
    def heads(self) -> int:
        return self.B * self.H_kv

    @property
    def q_tiles(self) -> int:
        return -(-self.S_q // self.m)

    @property
    def kv_tiles(self) -> int:
        return -(-self.S_kv // self.n)

    @property
    def head_bytes(self) -> int:
        """Of the rows of q and dout that the blocks of a head read, and of dQ that they add to."""
        return self.S_q * ((self.D + self.D_v) * ELEMENT_BYTES[self.dtype] + self.D * 4)

    def mask(self, whitebox: ModuleType):
        alignment = getattr(whitebox.Alignment, self.alignment)
        return whitebox.Mask.window(self.S_q, self.S_kv, alignment, self.left, self.right)

    def plan(self, whitebox: ModuleType):
        names = ("B", "H_kv", "S_q", "S_kv", "D", "D_v")
        sizes = {name: getattr(self, name) for name in names}
        return whitebox.plan_backward(
            dtype=getattr(whitebox.DType, self.dtype),
            shape=whitebox.Shape(H=self.H_kv * self.group, **sizes),
            mask=self.mask(whitebox),
            tile_m=self.m,
            tile_n=self.n,
            multiprocessors=self.multiprocessors,
        )

    def steps(self, mask, kv_tile: int) -> range:
        """The query tiles that the block of a key tile steps through, as the kernel finds them."""
        queries = mask.q_range(kv_tile * self.n, (kv_tile + 1) * self.n, self.S_q)
        return range(queries.begin // self.m, -(-queries.end // self.m))

    def seen_tiles(self, q_tile: int) -> range:
        """The key tiles that a query tile sees, from the diagonals that bound the mask."""
        offset = self.S_kv - self.S_q if self.alignment == "bottom_right" else 0
        q_begin, q_end = q_tile * self.m, min((q_tile + 1) * self.m, self.S_q)
        begin, end = 0, self.S_kv
        if self.left != UNBOUNDED:
            begin = max(begin, q_begin + offset - self.left)
        if self.right != UNBOUNDED:
            end = min(end, q_end + offset + self.right)
        return range(begin // self.n, -(-end // self.n)) if begin < end else range(0)


def sides(largest: int):
    return st.one_of(st.just(UNBOUNDED), st.just(0), st.integers(0, largest))


TILES = {
    "m": st.sampled_from([16, 32, 48, 64, 128]),
    "n": st.sampled_from([16, 32, 64, 96, 128]),
    "multiprocessors": st.one_of(st.integers(1, 4), st.sampled_from([40, 108, 132, 200])),
}
KINDS = {
    "dtype": st.sampled_from(sorted(ELEMENT_BYTES)),
    "alignment": st.sampled_from(["top_left", "bottom_right"]),
}
SMALL = st.builds(
    Call,
    B=st.integers(1, 4),
    H_kv=st.integers(1, 5),
    group=st.integers(1, 6),
    S_q=st.one_of(st.integers(1, 20), st.integers(1, 600)),
    S_kv=st.one_of(st.integers(1, 20), st.integers(1, 900)),
    D=st.sampled_from([1, 64, 1000, 8000, 60_000]),
    D_v=st.sampled_from([1, 64, 256, 9000]),
    left=sides(700),
    right=sides(700),
    **KINDS,
    **TILES,
)


@st.composite
def huge_calls(draw):
    """Sizes at and near what the callers allow."""
    length = st.one_of(st.integers(1, 300), st.integers(MAX_LENGTH - 300, MAX_LENGTH))
    side = st.one_of(sides(300), st.integers(UNBOUNDED - 300, UNBOUNDED))
    group = draw(st.sampled_from([1, 2, 5, 4096, 2**20, MAX_HEADS]))
    most = MAX_HEADS // group
    H_kv = draw(st.one_of(st.integers(1, min(4, most)), st.integers(1, most), st.just(most)))
    most = MAX_HEADS // (group * H_kv)
    return Call(
        B=draw(st.one_of(st.integers(1, min(4, most)), st.integers(1, most), st.just(most))),
        H_kv=H_kv,
        group=group,
        S_q=draw(length),
        S_kv=draw(length),
        D=draw(st.sampled_from([1, 64, 256])),
        D_v=draw(st.sampled_from([1, 64, 256, MAX_LENGTH])),
        left=draw(side),
        right=draw(side),
        **{name: draw(strategy) for name, strategy in (KINDS | TILES).items()},
    )


# Nine heads, of which four fit 32 MiB.
FITTING = Call(B=3, H_kv=3, S_q=1000, S_kv=300, D=1024, D_v=1024, right=0, multiprocessors=2)
# Nine heads, of which four have the 20 blocks that fill five multiprocessors.
FILLING = replace(FITTING, D=60_000, multiprocessors=5)
CAUSAL = [
    Call(S_q=S_q, S_kv=S_kv, alignment=alignment, right=0)
    for S_q, S_kv in ((500, 500), (500, 70), (70, 500), (1, 500))
    for alignment in ("top_left", "bottom_right")
]
WINDOWS = [
    replace(call, left=left, right=right, m=m, n=n)
    for call in CAUSAL
    for left, right in ((0, 0), (100, 0), (5, 70), (UNBOUNDED, 30), (30, UNBOUNDED))
    for m, n in ((64, 128), (32, 16))
]


def examples(calls: list[Call]):
    def decorate(test):
        for call in calls:
            test = example(call=call)(test)
        return test

    return decorate


def located(plan) -> list[tuple[int, int, int]]:
    coords = (plan.locate(index) for index in range(plan.blocks()))
    return [(at.b, at.h_kv, at.kv_tile) for at in coords]


def index_of(plan, call: Call, at) -> int:
    """The inverse of locate: the heads of a section vary fastest, then key tiles, sections."""
    head = at.b * call.H_kv + at.h_kv
    first = head // plan.section_heads * plan.section_heads
    section_heads = min(plan.section_heads, plan.heads - first)
    return first * plan.kv_tiles + at.kv_tile * section_heads + head - first


def test_the_limits_are_those_of_the_header(whitebox: ModuleType):
    assert whitebox.MAX_LENGTH == MAX_LENGTH
    assert whitebox.UNBOUNDED == UNBOUNDED


def test_the_examples_have_sections(whitebox: ModuleType):
    for call in (FITTING, FILLING):
        plan = call.plan(whitebox)
        assert 4 <= plan.section_heads < plan.heads == 9
        assert plan.heads % plan.section_heads != 0  # the last section is shorter


@given(call=SMALL)
@examples([FITTING, FILLING])
def test_counts(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    assert (plan.tile_m, plan.tile_n, plan.group) == (call.m, call.n, call.group)
    assert (plan.heads, plan.heads_per_batch) == (call.heads, call.H_kv)
    assert (plan.q_tiles, plan.kv_tiles) == (call.q_tiles, call.kv_tiles)
    assert plan.blocks() == call.heads * call.kv_tiles
    assert plan.dq_tiles() == call.heads * call.group * call.q_tiles


@given(call=SMALL)
@examples([FITTING, FILLING, replace(FITTING, right=UNBOUNDED)])
def test_every_key_tile_has_one_block(whitebox: ModuleType, call: Call):
    expected = itertools.product(range(call.B), range(call.H_kv), range(call.kv_tiles))
    assert sorted(located(call.plan(whitebox))) == list(expected)


@given(call=SMALL)
@examples([FITTING, FILLING, replace(FITTING, right=UNBOUNDED)])
def test_the_key_tiles_of_a_head_start_in_ascending_order(whitebox: ModuleType, call: Call):
    order: dict[tuple[int, int], list[int]] = {}
    for b, h_kv, kv_tile in located(call.plan(whitebox)):
        order.setdefault((b, h_kv), []).append(kv_tile)
    assert all(tiles == list(range(call.kv_tiles)) for tiles in order.values())


@given(call=SMALL)
@examples([FITTING, FILLING])
def test_earlier_key_tiles_come_first_within_a_section(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    order = []
    for b, h_kv, kv_tile in located(plan):
        head = b * call.H_kv + h_kv
        order.append((head // plan.section_heads, kv_tile, head))
    assert order == sorted(order)


@given(call=SMALL)
@examples(CAUSAL + WINDOWS)
def test_a_block_steps_through_the_query_tiles_that_see_its_keys(whitebox: ModuleType, call: Call):
    mask = call.mask(whitebox)
    steps = {
        (q_tile, kv_tile)
        for kv_tile in range(call.kv_tiles)
        for q_tile in call.steps(mask, kv_tile)
    }
    rows = ((q_idx, mask.kv_range(q_idx, q_idx + 1)) for q_idx in range(call.S_q))
    seen = {
        (q_idx // call.m, kv_tile)
        for q_idx, keys in rows
        if keys.size() > 0
        for kv_tile in range(keys.begin // call.n, (keys.end - 1) // call.n + 1)
    }
    assert steps == seen


@given(call=SMALL)
@examples([FITTING, FILLING, *CAUSAL, *WINDOWS])
def test_turns_are_counted_in_the_order_of_the_blocks(whitebox: ModuleType, call: Call):
    """Were each block to run only after those before it, none would wait."""
    plan, mask = call.plan(whitebox), call.mask(whitebox)
    added: Counter[tuple[int, int, int]] = Counter()
    turns = {
        (q_tile, kv_tile): plan.turn_of(mask, call.S_q, q_tile, kv_tile)
        for kv_tile in range(call.kv_tiles)
        for q_tile in call.steps(mask, kv_tile)
    }
    for b, h_kv, kv_tile in located(plan):
        for q_tile in call.steps(mask, kv_tile):
            assert turns[q_tile, kv_tile] == added[b, h_kv, q_tile]
            added[b, h_kv, q_tile] += 1
    for (_, _, q_tile), count in added.items():
        assert count == len(call.seen_tiles(q_tile))


@given(call=SMALL)
@examples([FITTING, FILLING, replace(FITTING, right=UNBOUNDED), *CAUSAL])
def test_sections_fill_the_device_and_hardly_more_than_the_cache(whitebox: ModuleType, call: Call):
    plan = call.plan(whitebox)
    if not call.mask(whitebox).is_banded():
        assert plan.section_heads == 1
        return
    assert 1 <= plan.section_heads <= call.heads
    filled = BLOCKS_PER_MULTIPROCESSOR * call.multiprocessors
    assert plan.section_heads * call.kv_tiles >= min(filled, plan.blocks())
    # Half a section has no more heads than fill the device or fit the cache: sections of even
    # length may be up to twice as long as that.
    half = -(-plan.section_heads // 2)
    if (half - 1) * call.kv_tiles >= filled:
        assert half * call.head_bytes <= CACHE_BYTES


def participates(call: Call, mask, q_tile: int, kv_tile: int) -> bool:
    return 0 <= kv_tile < call.kv_tiles and q_tile in call.steps(mask, kv_tile)


@given(call=huge_calls(), data=st.data())
@example(call=Call(B=MAX_HEADS, right=0), data=None)
@example(call=Call(B=MAX_HEADS, S_kv=MAX_LENGTH, n=16, right=0), data=None)
@example(call=Call(H_kv=MAX_HEADS, S_q=MAX_LENGTH, S_kv=MAX_LENGTH, right=0), data=None)
@example(call=Call(H_kv=2**10, S_kv=MAX_LENGTH // 2**6, n=16, left=0), data=None)
@example(call=Call(S_q=MAX_LENGTH, S_kv=MAX_LENGTH, m=16, n=16, left=9, right=0), data=None)
def test_plans_at_the_limits(whitebox: ModuleType, call: Call, data: st.DataObject | None):
    plan, mask = call.plan(whitebox), call.mask(whitebox)
    assert (plan.heads, plan.heads_per_batch) == (call.heads, call.H_kv)
    assert (plan.q_tiles, plan.kv_tiles) == (call.q_tiles, call.kv_tiles)
    assert plan.blocks() == call.heads * call.kv_tiles
    assert plan.dq_tiles() == call.heads * call.group * call.q_tiles
    assert 1 <= plan.section_heads <= (call.heads if mask.is_banded() else 1)
    section_blocks = plan.section_heads * plan.kv_tiles
    assert section_blocks < 2**32  # locate computes it in 32 bits
    if mask.is_banded():
        filled = BLOCKS_PER_MULTIPROCESSOR * call.multiprocessors
        assert section_blocks >= min(filled, plan.blocks(), MAX_SECTION_BLOCKS)

    def some(size: int) -> set[int]:
        inner = data.draw(st.integers(0, size - 1)) if data else size // 2
        return {0, inner, size - 1}

    for q_tile in some(plan.q_tiles):
        tiles = call.seen_tiles(q_tile)
        for kv_tile in some(plan.kv_tiles):
            assert participates(call, mask, q_tile, kv_tile) == (kv_tile in tiles)
        if not tiles:
            continue
        assert not participates(call, mask, q_tile, tiles.start - 1)
        assert not participates(call, mask, q_tile, tiles.stop)
        for turn in some(len(tiles)):
            assert participates(call, mask, q_tile, tiles[turn])
            assert plan.turn_of(mask, call.S_q, q_tile, tiles[turn]) == turn
    if plan.blocks() > MAX_BLOCKS:
        return
    for index in some(plan.blocks()):
        at = plan.locate(index)
        assert 0 <= at.b < call.B
        assert 0 <= at.h_kv < call.H_kv
        assert 0 <= at.kv_tile < plan.kv_tiles
        assert index_of(plan, call, at) == index


@pytest.mark.parametrize(
    ("call", "blocks"),
    [
        (Call(B=MAX_HEADS), MAX_BLOCKS),  # the largest plan that can be launched
        (Call(B=MAX_HEADS, S_kv=65), 2 * MAX_BLOCKS),
        (Call(H_kv=64, S_kv=MAX_LENGTH), 2**31 - 1024),
        (Call(H_kv=65, S_kv=MAX_LENGTH), 65 * (2**25 - 16)),
        (Call(B=MAX_HEADS, S_kv=MAX_LENGTH), MAX_HEADS * (2**25 - 16)),
    ],
)
@pytest.mark.parametrize("right", [0, UNBOUNDED])
def test_plans_with_too_many_blocks_are_seen(
    whitebox: ModuleType, call: Call, blocks: int, right: int
):
    assert replace(call, right=right).plan(whitebox).blocks() == blocks
