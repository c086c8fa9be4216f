# SPDX-License-Identifier: BSD-3-Clause
"""SoftmaxRow (csrc/core/softmax_row.h): the monoid it claims to be, and how far it rounds.

Every bound below is a number of roundings. A row over n scores in t tiles makes n weights, n sums
and t rescales, each good to an ulp or so of the row's sum, whatever the scores are: a weight
2^(s2 - m) is wrong by |s2 - m| ulp of itself, but x * 2^-x never exceeds 0.54.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

INF = math.inf
NAN = math.nan


@dataclass(frozen=True)
class Kind:
    """SoftmaxRow of one type, with the arithmetic a caller of it would do in that type."""

    whitebox: ModuleType
    row: Any
    real: Any  # numpy's scalar type

    @property
    def eps(self) -> float:
        return float(np.finfo(self.real).eps)

    @property
    def largest(self) -> float:
        return float(np.finfo(self.real).max)

    def max_of(self, scores):
        max_of = self.whitebox.max_of_f32 if self.real is np.float32 else self.whitebox.max_of_f64
        largest = -INF
        for score in scores:
            largest = max_of(largest, score)
        return largest

    def fold(self, tiles, values=None, slack=None):
        """The online softmax over `tiles` of scores, and the output for `values` of their shape."""
        row, out = self.row(), self.real(0)
        with np.errstate(invalid="ignore", over="ignore"):
            for index, tile in enumerate(tiles):
                tile_max = self.max_of(tile)
                lazily = slack is not None
                alpha = row.raise_lazily(tile_max, slack) if lazily else row.raise_to(tile_max)
                weights = [self.real(row.weight(score)) for score in tile]
                row.absorb(alpha, float(sum(weights, self.real(0))))
                if values is not None:
                    out = out * self.real(alpha)
                    for p, v in zip(weights, values[index], strict=True):
                        out += p * self.real(v)
        return row, float(out) * row.inverse_sum()

    def state(self, scores):
        return self.fold([scores])[0]


@pytest.fixture(scope="module", params=["F32", "F64"])
def kind(request: pytest.FixtureRequest, whitebox: ModuleType) -> Kind:
    real = np.float32 if request.param == "F32" else np.float64
    return Kind(whitebox, getattr(whitebox, f"SoftmaxRow{request.param}"), real)


def scores_in(bound: float):
    """Floats that are exact in single precision, so that both types see the same problem."""
    bound = float(np.float32(bound))
    finite = st.floats(-bound, bound, width=32, allow_subnormal=False)
    return st.one_of(finite, st.floats(-8, 8, width=32, allow_subnormal=False), st.just(-INF))


def tiles_of(bound: float = 1e4):
    return st.lists(st.lists(scores_in(bound), max_size=6), max_size=6)


TILE = st.lists(scores_in(1e4), max_size=8)
HUGE = [1e4, -1e4, 1e30, -1e30]


def flat(tiles):
    return [score for tile in tiles for score in tile]


def assert_same_state(a, b, rounding: float):
    assert a.m == b.m
    assert a.l == pytest.approx(b.l, rel=rounding, abs=0)


def lse_bound(kind: Kind, row, roundings: float) -> float:
    """lse = ln 2 * (m + log2 l): an ulp or two of each term, and the relative error of l."""
    if row.l == 0:
        return 0.0
    return kind.eps * (2 * abs(row.m) + 2 * abs(math.log2(row.l)) + roundings)


def assert_equals_the_definition(kind: Kind, tiles, slack: float | None = None):
    scores = flat(tiles)
    values = [[math.cos(7 * i + j) for j in range(len(tile))] for i, tile in enumerate(tiles)]
    row, out = kind.fold(tiles, values, slack)
    # A weight 2^slack is wrong by slack ulp.
    roundings = len(scores) + 4 * len(tiles) + 4 + (slack or 0)
    exact = kind.whitebox.exact_lse(scores)
    if exact == -INF:
        assert row.lse() == -INF
    else:
        assert row.lse() == pytest.approx(exact, rel=0, abs=lse_bound(kind, row, roundings))
    exact_out = kind.whitebox.exact_output(scores, flat(values))
    assert out == pytest.approx(exact_out, rel=0, abs=2 * roundings * kind.eps)


# --- the empty row


def test_empty_row_is_zero_output_and_minus_infinite_lse(kind: Kind):
    empty = kind.row()
    assert (empty.m, empty.l) == (-INF, 0)
    assert empty.base() == 0
    assert empty.inverse_sum() == 0
    assert empty.lse() == -INF
    assert empty.weight(-INF) == 0


@pytest.mark.parametrize("first", [-INF, -1e30, -3.0, 0.0, 5.0, 1e30])
def test_raising_an_empty_row_returns_zero(kind: Kind, first: float):
    row = kind.row()
    assert row.raise_to(first) == 0
    assert row.m == kind.real(first)


@pytest.mark.parametrize("tiles", [[], [[]], [[-INF]], [[-INF, -INF], [], [-INF] * 5]])
def test_row_whose_every_score_is_hidden_stays_empty(kind: Kind, tiles):
    row, out = kind.fold(tiles, values=[[3.0] * len(tile) for tile in tiles])
    assert (row.m, row.l, out, row.lse()) == (-INF, 0, 0, -INF)


@given(tiles=tiles_of(), position=st.integers(0, 6), width=st.integers(0, 4))
def test_hidden_tile_anywhere_changes_no_bit(kind: Kind, tiles, position: int, width: int):
    position = min(position, len(tiles))
    with_hidden = [*tiles[:position], [-INF] * width, *tiles[position:]]
    plain, _ = kind.fold(tiles)
    hidden, _ = kind.fold(with_hidden)
    assert (plain.m, plain.l) == (hidden.m, hidden.l)


# --- the monoid


@given(scores=TILE)
@example(scores=[])
def test_empty_row_is_the_identity_of_merge(kind: Kind, scores):
    row = kind.state(scores)
    for merged in (kind.row.merge(row, kind.row()), kind.row.merge(kind.row(), row)):
        assert (merged.m, merged.l) == (row.m, row.l)


@given(a=TILE, b=TILE)
def test_merge_is_commutative(kind: Kind, a, b):
    a, b = kind.state(a), kind.state(b)
    # A fused multiply-add may round the two products differently.
    assert_same_state(kind.row.merge(a, b), kind.row.merge(b, a), rounding=2 * kind.eps)


@given(a=TILE, b=TILE, c=TILE)
def test_merge_is_associative(kind: Kind, a, b, c):
    merge = kind.row.merge
    roundings = len(a) + len(b) + len(c) + 8
    a, b, c = kind.state(a), kind.state(b), kind.state(c)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert_same_state(left, right, rounding=roundings * kind.eps)


@given(tiles=tiles_of(), data=st.data())
def test_order_of_tiles_does_not_matter(kind: Kind, tiles, data: st.DataObject):
    order = data.draw(st.permutations(range(len(tiles))))
    values = [[math.sin(11 * i + j) for j in range(len(tile))] for i, tile in enumerate(tiles)]
    row, out = kind.fold(tiles, values)
    shuffled, shuffled_out = kind.fold([tiles[i] for i in order], [values[i] for i in order])
    rounding = kind.eps * (len(flat(tiles)) + 4 * len(tiles) + 4)
    assert_same_state(row, shuffled, rounding)
    assert out == pytest.approx(shuffled_out, rel=0, abs=2 * rounding)


@given(tiles=tiles_of())
def test_merging_single_tiles_equals_absorbing_them(kind: Kind, tiles):
    absorbed, _ = kind.fold(tiles)
    merged = kind.row()
    for tile in tiles:
        merged = kind.row.merge(merged, kind.state(tile))
    rounding = kind.eps * (len(flat(tiles)) + 4 * len(tiles) + 4)
    assert_same_state(absorbed, merged, rounding)


# --- raising lazily


@given(tiles=tiles_of(), slack=st.sampled_from([0.0, 1.0, 8.0]))
def test_row_raised_lazily_equals_the_definition(kind: Kind, tiles, slack: float):
    assert_equals_the_definition(kind, tiles, slack)


@given(tiles=tiles_of(bound=30.0))
def test_maximum_raised_lazily_is_never_further_behind_than_the_slack(kind: Kind, tiles):
    row = kind.row()
    for tile in tiles:
        m_old, tile_max = row.m, kind.max_of(tile)
        alpha = row.raise_lazily(tile_max, 8)
        if row.m == m_old:
            assert alpha == 1
        assert tile_max <= row.m + 8
        assert row.weight(tile_max) <= 2**8


# --- against the definition


@given(tiles=tiles_of())
def test_row_equals_the_definition(kind: Kind, tiles):
    assert_equals_the_definition(kind, tiles)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("size", [1, 2, 17, 257, 4099])
def test_error_grows_no_faster_than_the_roundings(kind: Kind, size: int, spread: float):
    random = np.random.default_rng(size)
    scores = (random.standard_normal(size) * spread).astype(np.float32).astype(float)
    values = random.standard_normal(size).astype(np.float32).astype(float)
    cuts = range(0, size, 64)
    tiles = [scores[i : i + 64].tolist() for i in cuts]
    row, out = kind.fold(tiles, [values[i : i + 64].tolist() for i in cuts])
    # Within a tile sums are plain; across tiles there is one addition and one rescale each.
    roundings = min(size, 64) + 4 * len(tiles) + 4
    exact = kind.whitebox.exact_lse(scores.tolist())
    assert row.lse() == pytest.approx(exact, rel=0, abs=lse_bound(kind, row, roundings))
    exact_out = kind.whitebox.exact_output(scores.tolist(), values.tolist())
    bound = 2 * roundings * kind.eps * float(np.abs(values).max())
    assert out == pytest.approx(exact_out, rel=0, abs=bound)


@given(tiles=tiles_of())
def test_weights_are_at_most_one_and_one_of_them_is(kind: Kind, tiles):
    row, _ = kind.fold(tiles)
    scores = flat(tiles)
    assume(any(score > -INF for score in scores))
    weights = [row.weight(score) for score in scores]
    assert max(weights) == 1
    assert min(weights) >= 0
    assert row.l >= 1


# --- extremes


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("others", [[0.0], [-1.0, 2.0, 3.5], [-INF, 0.25]])
@pytest.mark.parametrize("first", [True, False])
def test_one_huge_score(kind: Kind, huge: float, others, first: bool):
    huge = float(np.float32(huge))
    tiles = [[huge], others] if first else [others, [huge]]
    values = [[5.0], [1.0] * len(others)]
    row, out = kind.fold(tiles, values if first else values[::-1])
    assert row.m == max(huge, *others)
    assert out == pytest.approx(5.0 if huge > 0 else 1.0, rel=8 * kind.eps)
    exact = kind.whitebox.exact_lse(flat(tiles))
    assert row.lse() == pytest.approx(exact, rel=4 * kind.eps, abs=8 * kind.eps)


@given(tiles=tiles_of(bound=1e30))
def test_no_finite_scores_make_a_nan(kind: Kind, tiles):
    row, out = kind.fold(tiles, [[1.0] * len(tile) for tile in tiles])
    assert not math.isnan(row.l)
    assert not math.isnan(row.lse())
    assert out == 0 or out == pytest.approx(1.0, rel=kind.eps * (2 * len(flat(tiles)) + 8))


def test_largest_finite_scores(kind: Kind):
    row, out = kind.fold(
        [[-kind.largest], [kind.largest], [-kind.largest, 0.0]], [[9], [2], [9, 9]]
    )
    assert (row.m, row.l, out) == (kind.largest, 1, 2)


@given(tiles=tiles_of(), data=st.data())
def test_nan_score_reaches_the_sum(kind: Kind, tiles, data: st.DataObject):
    tiles = [*tiles, []]
    tile = data.draw(st.integers(0, len(tiles) - 1))
    position = data.draw(st.integers(0, len(tiles[tile])))
    poisoned = [list(t) for t in tiles]
    poisoned[tile].insert(position, NAN)
    row, out = kind.fold(poisoned, [[1.0] * len(t) for t in poisoned])
    assert math.isnan(row.l)
    assert math.isnan(row.lse())
    assert math.isnan(out)
    assert row.m == kind.fold(tiles)[0].m  # the maximum is that of the numbers
    whole = kind.row.merge(row, kind.state([1.0, 2.0]))
    assert math.isnan(whole.l)
    assert math.isnan(kind.row.merge(kind.state([1.0]), row).l)


@pytest.mark.parametrize("tiles", [[[INF]], [[1.0, INF]], [[INF], [1.0]], [[1.0], [INF, 2.0]]])
def test_plus_infinite_score_makes_the_row_nan_as_softmax_does(kind: Kind, tiles):
    row, out = kind.fold(tiles, [[1.0] * len(tile) for tile in tiles])
    assert math.isnan(row.l)
    assert math.isnan(out)


# --- partial results known by their lse


def test_from_lse_of_an_empty_part_is_the_empty_row(kind: Kind):
    row = kind.row.from_lse(-INF)
    assert (row.m, row.l) == (-INF, 0)


def test_from_lse_keeps_a_nan(kind: Kind):
    assert math.isnan(kind.row.from_lse(NAN).lse())
    both = kind.row.merge(kind.row.from_lse(NAN), kind.row.from_lse(1.0))
    assert math.isnan(both.l)


@given(lse=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False))
def test_from_lse_and_back(kind: Kind, lse: float):
    assert kind.row.from_lse(lse).lse() == pytest.approx(lse, rel=2 * kind.eps, abs=0)


@given(a=TILE, b=TILE)
def test_parts_known_by_lse_merge_to_the_whole(kind: Kind, a, b):
    parts = [kind.row.from_lse(kind.state(part).lse()) for part in (a, b)]
    whole = kind.row.merge(*parts)
    exact = kind.whitebox.exact_lse(a + b)
    if exact == -INF:
        assert whole.lse() == -INF
        return
    # Each part's m carries the rounding of its lse, which the larger part passes on.
    bound = lse_bound(kind, whole, len(a) + len(b) + 8) + 4 * kind.eps * abs(exact)
    assert whole.lse() == pytest.approx(exact, rel=0, abs=bound)


@given(a=TILE, b=TILE)
def test_rescale_to_shares_the_sum_among_the_parts(kind: Kind, a, b):
    parts = [kind.state(a), kind.state(b)]
    whole = kind.row.merge(*parts)
    factors = [part.rescale_to(whole) for part in parts]
    assert all(0 <= factor <= 1 for factor in factors)
    shared = sum(part.l * factor for part, factor in zip(parts, factors, strict=True))
    assert shared == pytest.approx(whole.l, rel=4 * kind.eps, abs=0)


def test_rescale_to_of_an_empty_part_is_zero(kind: Kind):
    assert kind.row().rescale_to(kind.state([3.0])) == 0
    assert kind.row().rescale_to(kind.row()) == 0


# --- the functions below it


def test_exp2_and_log2_are_exact_where_the_row_relies_on_it(whitebox: ModuleType):
    for suffix in ("f32", "f64"):
        exp2_of, log2_of = (
            getattr(whitebox, f"{name}_{suffix}") for name in ("exp2_of", "log2_of")
        )
        assert exp2_of(0.0) == 1
        assert exp2_of(-INF) == 0
        assert log2_of(1.0) == 0


def test_max_of_ignores_a_nan_on_either_side(whitebox: ModuleType):
    for max_of in (whitebox.max_of_f32, whitebox.max_of_f64):
        assert max_of(NAN, 2.0) == 2
        assert max_of(2.0, NAN) == 2
        assert max_of(-INF, 2.0) == 2
        assert math.isnan(max_of(NAN, NAN))
