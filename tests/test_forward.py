# SPDX-License-Identifier: BSD-3-Clause
"""Results, for every row of the support table: shapes, masks, scales, head dims, lengths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
import online_attention
from attend import assert_right, attend, check_case, rounding_magnitude
from cases import Case, Inputs, normal
from oracle import CAUSAL, FULL, Mask
from rows import Target
from tolerance import assert_bitwise_equal

HEAD_DIM_CASES = [
    *[Case(f"d{d}", 67, 129, D=d, mask=CAUSAL) for d in cases.HEAD_DIMS],
    *[Case(f"d{d}-dv{d_v}", 67, 129, D=d, D_v=d_v) for d, d_v in cases.UNEQUAL_HEAD_DIMS],
]


@pytest.mark.small
@pytest.mark.cases(cases.SMALL)
def test_small(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.small
@pytest.mark.cases(cases.SMALL_SPLIT)
def test_small_split(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(cases.FULL_CASES)
def test_full(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(HEAD_DIM_CASES)
def test_head_dims(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(cases.SPLIT)
def test_few_queries_and_many_keys(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.slow
@pytest.mark.cases(cases.STRESS)
def test_stress(target: Target, case: Case):
    check_case(target, case)


# --- what is drawn


@st.composite
def problems(draw, target: Target):
    """Shapes, a mask and a scale. Sizes are small enough to meet every edge often."""
    D, D_v = (draw(st.integers(target.head_dims[0], target.head_dims[0] + 66)) for _ in range(2))
    group, H_kv = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    S_q, S_kv = draw(st.integers(1, 70)), draw(st.integers(0, 140))
    side = st.one_of(st.just(-1), st.integers(0, 150))
    mask = draw(
        st.one_of(
            st.sampled_from([FULL, CAUSAL]),
            st.builds(Mask, st.sampled_from(["top_left", "bottom_right"]), side, side),
        )
    )
    scale = draw(st.one_of(st.none(), st.floats(-2, 2)))
    case = Case(
        "drawn", S_q, S_kv, D, D_v, draw(st.integers(1, 2)), H_kv * group, H_kv, mask, scale
    )
    return case, draw(st.integers(0, 1000))


@given(data=st.data())
def test_any_problem(target: Target, data: st.DataObject):
    case, seed = data.draw(problems(target))
    inputs = case.inputs(target.dtype, target.device, target.head_dim, seed)
    ours = attend(*inputs, case.mask, case.scale)
    magnitude = rounding_magnitude(inputs, case.scale)
    assert_right(ours, inputs, case.mask, case.scale, magnitude=magnitude)


# --- form of the outputs


def test_outputs_have_the_contracts_shape_dtype_and_device(target: Target):
    D = target.head_dim
    q, k, v = normal((2, 6, 5, D), (2, 3, 7, D), (2, 3, 7, D - 1 or 1),
                     dtype=target.dtype, device=target.device)  # fmt: skip
    out = online_attention.attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    same_out, lse = online_attention.attention(q, k, v, return_lse=True)
    assert_bitwise_equal(out, same_out)
    assert out.shape == (2, 6, 5, D - 1)
    assert (out.dtype, out.device) == (q.dtype, q.device)
    assert lse.shape == (2, 6, 5)
    assert lse.dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32)
    assert lse.device == q.device
    assert lse.is_contiguous()
    assert not out.requires_grad


def test_inputs_are_left_as_they_were(target: Target):
    inputs = Case("any", 17, 33, mask=CAUSAL).inputs(target.dtype, target.device, target.head_dim)
    before = [x.clone() for x in inputs]
    attend(*inputs, CAUSAL)
    for x, was in zip(inputs, before, strict=True):
        assert_bitwise_equal(x, was)


def test_weights_sum_to_one(target: Target):
    q, k, v = Case("any", 67, 259).inputs(target.dtype, target.device, target.head_dim)
    out = attend(q, k, torch.ones_like(v), CAUSAL).out
    eps = torch.finfo(target.dtype).eps
    torch.testing.assert_close(out, torch.ones_like(out), rtol=8 * eps, atol=0)


@pytest.mark.parametrize(("H", "H_kv"), [(2, 1), (6, 3), (6, 2), (5, 1), (16, 2)])
def test_grouped_heads_are_repeated_heads(target: Target, H: int, H_kv: int):
    case = Case("grouped", 19, 71, H=H, H_kv=H_kv, B=2, mask=CAUSAL)
    q, k, v = case.inputs(target.dtype, target.device, target.head_dim)
    repeated = [x.repeat_interleave(H // H_kv, dim=1) for x in (k, v)]
    assert_right(attend(q, k, v, CAUSAL), Inputs(q, *repeated), CAUSAL)


# --- rows and tensors with nothing in them


@pytest.mark.parametrize("mask", [FULL, CAUSAL])
def test_no_keys_at_all(target: Target, mask: Mask):
    q, k, v = Case("no-keys", 5, 0, B=2).inputs(target.dtype, target.device, target.head_dim)
    ours = attend(q, k, v, mask)
    assert_bitwise_equal(ours.out, torch.zeros_like(ours.out))
    assert (ours.lse == -math.inf).all()


@pytest.mark.parametrize(("S_q", "S_kv"), [(70, 1), (130, 67), (257, 128), (65, 64), (300, 3)])
def test_rows_before_the_first_key_are_zero(target: Target, S_q: int, S_kv: int):
    inputs = Case("more-queries", S_q, S_kv).inputs(target.dtype, target.device, target.head_dim)
    ours = attend(*inputs, CAUSAL)
    blind = S_q - S_kv
    assert_bitwise_equal(ours.out[:, :, :blind], torch.zeros_like(ours.out[:, :, :blind]))
    assert (ours.lse[:, :, :blind] == -math.inf).all()
    assert ours.lse[:, :, blind:].isfinite().all()


def test_rows_beyond_the_window_are_zero(target: Target):
    inputs = Case("window", 140, 70).inputs(target.dtype, target.device, target.head_dim)
    mask = Mask("top_left", left=5, right=0)  # queries 75 and later see no key
    ours = attend(*inputs, mask)
    assert_bitwise_equal(ours.out[:, :, 75:], torch.zeros_like(ours.out[:, :, 75:]))
    assert (ours.lse[:, :, 75:] == -math.inf).all()
    assert_right(ours, inputs, mask)


@pytest.mark.parametrize(
    ("B", "H", "H_kv", "S_q", "S_kv"),
    [(0, 2, 2, 3, 5), (2, 0, 0, 3, 5), (2, 0, 2, 3, 5), (2, 4, 2, 0, 5), (2, 2, 1, 0, 0)],
)
@pytest.mark.parametrize("mask", [FULL, CAUSAL])
def test_empty_results(target: Target, B: int, H: int, H_kv: int, S_q: int, S_kv: int, mask: Mask):
    D = target.head_dim
    q, k, v = normal((B, H, S_q, D), (B, H_kv, S_kv, D), (B, H_kv, S_kv, D),
                     dtype=target.dtype, device=target.device)  # fmt: skip
    ours = attend(q, k, v, mask)
    assert ours.out.shape == (B, H, S_q, D)
    assert ours.lse.shape == (B, H, S_q)


# --- many, and far


def test_more_heads_than_a_grid_dimension_holds(target: Target):
    D = target.head_dim if target.head_dim < 64 else None
    case = Case("many-heads", 1, 2, D=D, B=257, H=256, H_kv=128)  # 65,792 rows
    inputs = case.inputs(target.dtype, target.device, target.head_dims[0])
    assert_right(attend(*inputs), inputs)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_score_of_1e4_decides_the_row(target: Target, sign: float):
    D = target.head_dim
    q, k, v = normal((1, 1, 3, D), (1, 1, 77, D), (1, 1, 77, D),
                     dtype=target.dtype, device=target.device)  # fmt: skip
    q[..., 0], k[:, :, 41, 0] = 100 * sign, 100
    k[..., 1:] = 0
    ours = attend(q, k, v, scale=1.0)
    if sign > 0:
        torch.testing.assert_close(ours.out, v[:, :, 41:42].expand_as(ours.out), rtol=0, atol=0)
    k[:, :, 41, 0] = 99  # the same but for one key: the row below the others stays hidden
    assert_right(attend(q, k, v, scale=1.0), Inputs(q, k, v), scale=1.0, magnitude=4.0)


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e3, 1e12])
def test_scores_beyond_all_resolution_still_have_a_largest(target: Target, scale: float):
    """Scores of 1e9 to 1e21, where neighbouring numbers lie further apart than exp reaches."""
    D = target.head_dim
    q, k, v = normal((1, 2, 70, D), (1, 2, 150, D), (1, 2, 150, D),
                     dtype=target.dtype, device=target.device)  # fmt: skip
    q[..., 1:], k[..., 1:] = 0, 0
    q[..., 0], k[..., 0] = math.copysign(3e4, scale), 2e4
    k[:, :, 41, 0] = 3e4
    eps = torch.finfo(target.dtype).eps
    largest = attend(q, k, v, scale=scale)
    winner = v[:, :, 41:42].expand_as(largest.out)
    torch.testing.assert_close(largest.out, winner, rtol=2 * eps, atol=0)
    k[..., 0] = 3e4
    equal = attend(q, k, v, scale=scale)
    mean = v.double().mean(2, keepdim=True).expand_as(equal.out)
    torch.testing.assert_close(equal.out.double(), mean, rtol=32 * eps, atol=32 * eps)
    score = q[0, 0, 0, 0].double() * k[0, 0, 0, 0].double() * scale
    lse = equal.lse.double()
    torch.testing.assert_close(lse, score.expand_as(lse), rtol=1e-6, atol=0)


# --- scales


def test_zero_scale_is_the_mean_of_what_is_seen(target: Target):
    inputs = Case("zero", 7, 67).inputs(target.dtype, target.device, target.head_dim)
    for zero in (0.0, -0.0, 1e-45, 0):
        ours = attend(*inputs, CAUSAL, scale=zero)
        assert_right(ours, inputs, CAUSAL, scale=0.0)
        keys = torch.arange(61, 68, dtype=ours.lse.dtype, device=target.device)
        torch.testing.assert_close(ours.lse, keys.log().expand_as(ours.lse), rtol=1e-6, atol=0)


def test_negative_scale_is_that_of_the_negated_query(target: Target):
    q, k, v = Case("any", 67, 129).inputs(target.dtype, target.device, target.head_dim)
    negative, positive = attend(q, k, v, CAUSAL, -0.37), attend(-q, k, v, CAUSAL, 0.37)
    assert_bitwise_equal(negative.out, positive.out)
    assert_bitwise_equal(negative.lse, positive.lse)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 7, 50.0, True + 0.5])
def test_other_scales(target: Target, scale: float):
    inputs = Case("any", 33, 65).inputs(target.dtype, target.device, target.head_dim)
    assert_right(attend(*inputs, CAUSAL, scale), inputs, CAUSAL, scale)


def test_default_scale_is_one_over_the_root_of_the_head_dim(target: Target):
    inputs = Case("any", 9, 17).inputs(target.dtype, target.device, target.head_dim)
    default, given_scale = attend(*inputs), attend(*inputs, scale=1 / math.sqrt(target.head_dim))
    assert_bitwise_equal(default.out, given_scale.out)
