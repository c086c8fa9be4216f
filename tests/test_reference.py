# SPDX-License-Identifier: BSD-3-Clause
"""online_attention.reference against its definitions, torch's operators, and itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import oracle
from online_attention import reference
from online_attention.reference import SoftmaxState

INF = math.inf
ALIGNMENTS = ("top_left", "bottom_right")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- softmax of the last dimension

score = st.one_of(
    st.floats(-20, 20), st.floats(-1e4, 1e4), st.just(-INF), st.sampled_from([-1e308, 0.0, 1e308])
)


@st.composite
def score_rows(draw, smallest: int = 0) -> Tensor:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(smallest, 17))
    flat = draw(st.lists(score, min_size=rows * length, max_size=rows * length))
    return torch.tensor(flat, dtype=torch.float64).view(rows, length)


@given(x=score_rows(smallest=1))
def test_safe_softmax_is_torchs_but_for_empty_rows(x: Tensor):
    empty = (x == -INF).all(-1, keepdim=True)
    assert_same(reference.safe_softmax(x), torch.softmax(x, -1).masked_fill(empty, 0.0))


@given(x=score_rows(), block_size=st.integers(1, 20))
def test_online_softmax_is_safe_softmax_for_every_block_size(x: Tensor, block_size: int):
    assert_same(reference.online_softmax(x, block_size), reference.safe_softmax(x))


@given(x=score_rows(smallest=1), block_size=st.integers(1, 20))
def test_every_state_is_that_of_the_scores_so_far(x: Tensor, block_size: int):
    states = reference.online_softmax_states(x, block_size)
    assert len(states) == math.ceil(x.shape[1] / block_size)
    for i, state in enumerate(states):
        seen = x[:, : (i + 1) * block_size]
        m = seen.amax(-1)
        base = torch.where(m == -INF, 0.0, m)
        assert torch.equal(state.m, m)
        assert_same(state.l, torch.exp(seen - base[:, None]).sum(-1))
        assert_same(state.lse(), torch.logsumexp(seen, -1))


@given(x=score_rows(smallest=1), data=st.data())
def test_blocks_may_come_in_any_order(x: Tensor, data: st.DataObject):
    columns = data.draw(st.permutations(range(x.shape[1])))
    block_size = data.draw(st.integers(1, 20))
    shuffled = reference.online_softmax(x[:, columns], block_size)
    assert_same(shuffled, reference.online_softmax(x, block_size)[:, columns])


@given(x=score_rows(smallest=3), data=st.data())
def test_states_merge_in_any_order_and_grouping(x: Tensor, data: st.DataObject):
    first, second = sorted(data.draw(st.integers(0, x.shape[1])) for _ in range(2))
    empty = SoftmaxState.empty((x.shape[0],), dtype=x.dtype, device=x.device)
    cuts = (x[:, :first], x[:, first:second], x[:, second:])
    a, b, c = (empty.absorb(part)[0] for part in cuts)
    whole = empty.absorb(x)[0]
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert torch.equal(merged.m, whole.m)
        assert_same(merged.l, whole.l)
    for merged in (whole.merge(empty), empty.merge(whole)):
        assert torch.equal(merged.m, whole.m)
        assert torch.equal(merged.l, whole.l)


def test_rows_of_minus_infinity_give_zeros():
    x = torch.tensor([[-INF, -INF, -INF], [-INF, 0.0, -INF]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert torch.equal(reference.safe_softmax(x), expected)
    for block_size in (1, 2, 3, 9):
        assert torch.equal(reference.online_softmax(x, block_size), expected)
        last = reference.online_softmax_states(x, block_size)[-1]
        assert torch.equal(last.lse(), torch.tensor([-INF, 0.0]))


def test_scores_too_large_for_exp_are_no_problem():
    x = torch.tensor([[1e30, 1e30, -1e30], [-1e30, -1e30, -INF]])
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    assert torch.equal(reference.safe_softmax(x), expected)
    assert torch.equal(reference.online_softmax(x, 1), expected)


def test_alpha_brings_earlier_weights_to_the_new_maximum():
    empty = SoftmaxState.empty((1,), dtype=torch.float64, device=torch.device("cpu"))
    state, alpha, p = empty.absorb(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert alpha.item() == 0.0
    assert_same(p, torch.tensor([[math.exp(-1), 1.0]], dtype=torch.float64))
    later, alpha, _ = state.absorb(torch.tensor([[5.0]], dtype=torch.float64))
    assert alpha.item() == pytest.approx(math.exp(-3))
    assert later.l.item() == pytest.approx((math.exp(-1) + 1) * math.exp(-3) + 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax_keeps_the_dtype_and_half_types_are_computed_in_fp32(dtype: torch.dtype):
    x = normal(3, 50, dtype=dtype)
    for result in (reference.safe_softmax(x), reference.online_softmax(x, 7)):
        assert result.dtype == dtype
        expected = torch.softmax(x.double(), -1)
        floor = torch.finfo(dtype).eps
        assert float(((result.double() - expected) / expected).abs().max()) <= 8 * floor
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert reference.online_softmax_states(x, 7)[0].l.dtype == expected_dtype


def test_softmax_is_differentiable_twice():
    x = normal(2, 7).requires_grad_()
    hidden = torch.tensor([[False] * 7, [True, False, True, False, True, True, False]])
    for softmax in (reference.safe_softmax, lambda x: reference.online_softmax(x, 3)):
        assert gradcheck(lambda x: softmax(x.masked_fill(hidden, -INF)), (x,))  # noqa: B023
        assert gradgradcheck(lambda x: softmax(x.masked_fill(hidden, -INF)), (x,))  # noqa: B023


# --- attention


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    keywords: dict[str, Any]

    @property
    def mask(self) -> oracle.Mask:
        right = 0 if self.keywords["causal"] else oracle.UNBOUNDED
        return oracle.Mask(self.keywords["alignment"], right=right)

    def by_definition(self) -> oracle.Attention:
        return oracle.by_definition(self.q, self.k, self.v, self.mask, self.keywords["scale"])

    def naive(self) -> tuple[Tensor, Tensor]:
        return reference.naive_attention(self.q, self.k, self.v, return_lse=True, **self.keywords)

    def tiled(self, tile_q: int, tile_kv: int) -> tuple[Tensor, Tensor]:
        return reference.tiled_attention(
            self.q, self.k, self.v, tile_q=tile_q, tile_kv=tile_kv, return_lse=True,
            **self.keywords,
        )  # fmt: skip


@st.composite
def problems(draw, smallest: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    H_kv, group = draw(st.integers(smallest, 3)), draw(st.integers(1, 3))
    B = draw(st.integers(smallest, 2))
    S_q, S_kv = draw(st.integers(smallest, 11)), draw(st.integers(smallest, 11))
    D, D_v = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    seed, spread = draw(st.integers(0, 1000)), draw(st.sampled_from([1.0, 30.0]))
    return Problem(
        q=normal(B, H_kv * group, S_q, D, seed=seed, dtype=dtype) * spread,
        k=normal(B, H_kv, S_kv, D, seed=seed + 1, dtype=dtype),
        v=normal(B, H_kv, S_kv, D_v, seed=seed + 2, dtype=dtype),
        keywords={
            "causal": draw(st.booleans()),
            "alignment": draw(st.sampled_from(ALIGNMENTS)),
            "scale": draw(st.one_of(st.none(), st.just(0.0), st.floats(-3, 3))),
        },
    )


TILE = st.integers(1, 13)


@given(problem=problems())
def test_naive_attention_is_the_definition(problem: Problem):
    out, lse = problem.naive()
    exact = problem.by_definition()
    assert_same(out, exact.out)
    assert_same(lse, exact.lse)


@given(problem=problems(), tile_q=TILE, tile_kv=TILE)
def test_tiled_attention_is_naive_attention_for_all_tile_sizes(
    problem: Problem, tile_q: int, tile_kv: int
):
    for tiled, naive in zip(problem.tiled(tile_q, tile_kv), problem.naive(), strict=True):
        assert tiled.shape == naive.shape
        assert_same(tiled, naive)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_of_results_and_their_error(dtype: torch.dtype):
    q, k, v = (normal(1, 2, 37, 16, seed=seed, dtype=dtype) for seed in range(3))
    exact = reference.naive_attention(q.double(), k.double(), v.double(), return_lse=True)
    calls = (
        reference.naive_attention(q, k, v, return_lse=True),
        reference.tiled_attention(q, k, v, tile_q=8, tile_kv=5, return_lse=True),
    )
    for out, lse in calls:
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float((out.double() - exact[0]).abs().max()) <= 8 * torch.finfo(dtype).eps
        assert float((lse.double() - exact[1]).abs().max()) <= 8 * torch.finfo(dtype).eps


def test_lse_comes_on_request_alone():
    q = normal(1, 1, 2, 3)
    assert isinstance(reference.naive_attention(q, q, q), Tensor)
    assert isinstance(reference.tiled_attention(q, q, q, tile_q=1, tile_kv=1), Tensor)


def test_alignments_differ_where_lengths_do():
    q, k, v = normal(1, 1, 1, 4), normal(1, 1, 3, 4, seed=1), normal(1, 1, 3, 2, seed=2)
    last = reference.naive_attention(q, k, v, causal=True)
    assert torch.equal(last, reference.naive_attention(q, k, v))
    first = reference.naive_attention(q, k, v, causal=True, alignment="top_left")
    assert_same(first[0, 0, 0], v[0, 0, 0])


def test_rows_without_a_key_give_zero_and_minus_infinity():
    q, k = normal(1, 2, 5, 4), normal(1, 2, 3, 4)
    for route, tiles in ROUTES:
        out, lse = route(q, k, k, causal=True, return_lse=True, **tiles)
        assert torch.equal(out[:, :, :2], torch.zeros(1, 2, 2, 4, dtype=torch.float64))
        assert torch.equal(lse[:, :, :2], torch.full((1, 2, 2), -INF, dtype=torch.float64))
        assert bool(lse[:, :, 2:].isfinite().all())


ROUTES = [
    (reference.naive_attention, {}),
    (reference.tiled_attention, {"tile_q": 3, "tile_kv": 2}),
    (reference.tiled_attention, {"tile_q": 1, "tile_kv": 99}),
]


@pytest.mark.parametrize(("route", "tiles"), ROUTES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_those_of_torch(route: Any, tiles: dict[str, int], is_causal: bool):
    shapes = (2, 4, 6, 5), (2, 2, 9, 5), (2, 2, 9, 3)
    inputs = [normal(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=is_causal, enable_gqa=True)
    ours = route(*inputs, causal=is_causal, alignment="top_left", **tiles)
    assert_same(ours, theirs)
    dout = normal(*theirs.shape, seed=9)
    pairs = zip(
        torch.autograd.grad(ours, inputs, dout),
        torch.autograd.grad(theirs, inputs, dout),
        strict=True,
    )
    for mine, due in pairs:
        assert_same(mine, due)


@pytest.mark.parametrize(("route", "tiles"), ROUTES)
def test_both_results_are_differentiable_twice_with_empty_rows(route: Any, tiles: dict[str, int]):
    shapes = (1, 2, 4, 2), (1, 1, 3, 2), (1, 1, 3, 1)
    inputs = tuple(normal(*s, seed=i).requires_grad_() for i, s in enumerate(shapes))

    def visible_results(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = route(*inputs, causal=True, return_lse=True, **tiles)
        return out, lse[:, :, 1:]  # the lse of row 0, which sees no key, is -inf

    assert gradcheck(visible_results, inputs)
    assert gradgradcheck(visible_results, inputs)
    dq = torch.autograd.grad(route(*inputs, causal=True, **tiles).sum(), inputs[0])[0]
    assert torch.equal(dq[:, :, 0], torch.zeros(1, 2, 2, dtype=torch.float64))


POISON = st.sampled_from([math.nan, INF, -INF])


@given(problem=problems(smallest=1), poison=POISON, data=st.data())
def test_what_is_hidden_from_a_row_does_not_exist_for_it(
    problem: Problem, poison: float, data: st.DataObject
):
    """Poison in the last keys: rows that do not see it keep their results and gradients."""
    s_q, s_kv = problem.q.shape[2], problem.k.shape[2]
    poisoned = slice(data.draw(st.integers(0, s_kv - 1)), s_kv)
    ends = [problem.mask.keys(q_idx, s_q, s_kv).stop for q_idx in range(s_q)]
    rows = [q_idx for q_idx in range(s_q) if ends[q_idx] <= poisoned.start]
    assume(rows)
    k, v = problem.k.clone(), problem.v.clone()
    for x in data.draw(st.sampled_from([(k,), (v,), (k, v)])):
        x[:, :, poisoned] = poison
    for route, tiles in ROUTES:
        due, mine = (
            with_query_gradient(route, inputs, rows, {**tiles, **problem.keywords})
            for inputs in ((problem.q, problem.k, problem.v), (problem.q, k, v))
        )
        for x, without_poison in zip(mine, due, strict=True):
            assert_same(x[:, :, rows], without_poison[:, :, rows])


def with_query_gradient(
    route: Any, inputs: tuple[Tensor, ...], rows: list[int], keywords: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    q = inputs[0].clone().requires_grad_()
    out, lse = route(q, *inputs[1:], return_lse=True, **keywords)
    return out, lse, torch.autograd.grad(out[:, :, rows].sum(), q)[0]


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize(("route", "tiles"), ROUTES)
def test_what_is_hidden_from_all_rows_has_gradient_zero(
    route: Any, tiles: dict[str, int], poison: float
):
    q, k, v = normal(1, 2, 4, 3), normal(1, 2, 7, 3, seed=1), normal(1, 2, 7, 2, seed=2)
    keywords = {"causal": True, "alignment": "top_left", **tiles}
    gradients = []
    for value in (0.0, poison):
        k[:, :, 4:] = v[:, :, 4:] = value
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = route(*inputs, return_lse=True, **keywords)
        gradients.append(torch.autograd.grad(out.square().sum() + lse.sum(), inputs))
    for clean, poisoned in zip(*gradients, strict=True):
        assert_same(poisoned, clean)
    for dk_or_dv in gradients[1][1:]:
        assert not bool(dk_or_dv[:, :, 4:].any())


@given(problem=problems(smallest=1), data=st.data())
def test_what_is_seen_does_reach_the_output(problem: Problem, data: st.DataObject):
    kv_idx = data.draw(st.integers(0, problem.k.shape[2] - 1))
    poisoned = data.draw(st.sampled_from([problem.k, problem.v]))
    poisoned[:, :, kv_idx] = math.nan
    s_q, s_kv = problem.q.shape[2], problem.k.shape[2]
    sees = [kv_idx in problem.mask.keys(q_idx, s_q, s_kv) for q_idx in range(s_q)]
    for out, _ in (problem.naive(), problem.tiled(2, 3)):
        assert torch.equal(out.isnan().all(-1).all(1).all(0), torch.tensor(sees))
        assert torch.equal(out.isnan().any(-1).any(1).any(0), torch.tensor(sees))


# --- costs


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("causal", "s_q", "s_kv"), [(False, 5, 8), (True, 5, 8), (True, 8, 5)])
def test_traffic_counts_what_the_algorithm_does(alignment: Any, causal: bool, s_q: int, s_kv: int):
    q = normal(2, 4, s_q, 6, dtype=torch.float32)
    k, v = normal(2, 2, s_kv, 6, dtype=torch.float32), normal(2, 2, s_kv, 3, dtype=torch.float32)
    mask = {"causal": causal, "alignment": alignment}
    with FlopCounterMode(display=False) as counter:
        out, lse = reference.tiled_attention(q, k, v, tile_q=1, tile_kv=1, return_lse=True, **mask)
    cost = reference.traffic(q.shape, k.shape, v.shape, **mask)
    assert cost.flops == counter.get_total_flops()
    assert cost.input_bytes == q.nbytes + k.nbytes + v.nbytes
    assert cost.output_bytes == out.nbytes + lse.nbytes
    assert cost.score_matrix_bytes == 2 * 4 * s_q * s_kv * 4
    assert cost.naive_traffic_bytes - 4 * cost.score_matrix_bytes == q.nbytes + k.nbytes + (
        v.nbytes + out.nbytes + lse.nbytes
    )
    assert cost.naive_peak_bytes == cost.tiled_peak_bytes + 2 * cost.score_matrix_bytes


def test_traffic_of_taller_tiles_is_less_and_of_wider_types_more():
    shape = (1, 8, 1000, 64)
    short, tall = (reference.traffic(shape, shape, shape, tile_q=n) for n in (64, 128))
    assert short.naive_traffic_bytes == tall.naive_traffic_bytes
    assert short.tiled_traffic_bytes > tall.tiled_traffic_bytes
    by_dtype = [reference.traffic(shape, shape, shape, dtype=dtype) for dtype in FLOATS]
    inputs = [cost.input_bytes for cost in by_dtype]
    assert inputs == [inputs[0], inputs[0], 2 * inputs[0], 4 * inputs[0]]
