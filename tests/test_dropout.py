# SPDX-License-Identifier: BSD-3-Clause
"""Dropout by the operators, for every row: which pairs are dropped, results, gradients, errors.

The oracle takes its pairs from the tests' own Philox, so a row that agrees with it drops the same.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from attend import KEEP_ALL, Dropout, assert_right, attend, rounding_magnitude
from cases import Case, Inputs, normal
from gradients import assert_right as assert_gradients_right
from gradients import by_operators, cotangents_of
from oracle import CAUSAL, FULL, Mask
from philox import OUTCOMES, factors_of, kept_pairs, threshold_of
from rows import Target
from tolerance import assert_bitwise_equal, assert_lse_close

pytestmark = pytest.mark.usefixtures("one_thread")
FP32 = {"dtypes": (torch.float32,)}
P = 0.3

CASES = [
    Case("one-by-one", 1, 1),
    Case("odd", 5, 7, B=2),
    Case("tile-plus-one", 65, 67),
    Case("grouped-causal", 33, 70, H=4, H_kv=2, mask=CAUSAL),
    Case("more-queries", 70, 33, mask=CAUSAL),
    Case("window", 40, 150, mask=Mask("top_left", left=50, right=35)),
    Case("decode", 1, 131, B=2),
    Case("split", 3, 1031, H=2, H_kv=1),
]


def state(target: Target, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(target.device)


def inputs_of(target: Target, S_q: int, S_kv: int, **sizes: int) -> Inputs:
    return Case("any", S_q, S_kv, **sizes).inputs(target.dtype, target.device, target.head_dim)


def shape_of(inputs: Inputs) -> tuple[int, int, int, int]:
    q, k, _ = inputs
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]


# --- which pairs


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
def test_kept_pairs_are_those_of_philox(target: Target, p: float):
    """Equal weights and values of 0 but for a 1: what is not 0 was kept."""
    B, H, S_q, S_kv, D = 2, 3, 21, 103, target.head_dim
    q, k = (torch.zeros(B, H, n, D, dtype=target.dtype, device=target.device) for n in (S_q, S_kv))
    rng = state(target)
    due = kept_pairs(rng, p, B, H, S_q, S_kv)
    ones = torch.eye(S_kv, dtype=target.dtype, device=target.device)
    for first in range(0, S_kv, D):
        columns = torch.nn.functional.pad(ones[:, first : first + D], (0, max(0, first + D - S_kv)))
        v = columns.expand(B, H, S_kv, D)
        out = attend(q, k, v, dropout=Dropout(rng, p)).out[..., : S_kv - first]
        kept = due[..., first : first + D]
        assert torch.equal(out != 0, kept)
        weight = OUTCOMES / (OUTCOMES - threshold_of(p)) / S_kv
        eps = torch.finfo(target.dtype).eps
        torch.testing.assert_close(out.double(), kept.double() * weight, rtol=4 * eps, atol=0)


def test_the_state_alone_decides(target: Target):
    inputs = inputs_of(target, 33, 65, B=2)
    same, again = (attend(*inputs, dropout=Dropout(state(target), P)) for _ in range(2))
    assert_bitwise_equal(same.out, again.out)
    for index in range(2):  # each of its numbers
        changed = state(target)
        changed[index] += 1
        other = attend(*inputs, dropout=Dropout(changed, P))
        assert not torch.equal(same.out, other.out)
        assert not torch.equal(same.out[:, 0], same.out[:, 1])
    first = Inputs(*(x[:1] for x in inputs))
    settings = {"deterministic": True, "dropout": Dropout(state(target), P)}
    assert_bitwise_equal(attend(*first, **settings).out, attend(*inputs, **settings).out[:1])


def test_the_upper_half_of_the_last_number_is_not_used(target: Target):
    inputs = inputs_of(target, 5, 67)
    rng = torch.tensor([3, 5], device=target.device)
    other = torch.tensor([3, 5 + 2**32], device=target.device)
    results = [attend(*inputs, dropout=Dropout(x, P)).out for x in (rng, other)]
    assert_bitwise_equal(*results)


# --- results


@pytest.mark.small
@pytest.mark.cases(CASES)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_out_and_gradients(target: Target, case: Case, biased: bool):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    rng = state(target)
    dropout, factors = Dropout(rng, P), factors_of(rng, P, *shape_of(inputs))
    bias = None
    if biased:
        (drawn,) = normal(
            (1, case.H, 1, case.S_kv), dtype=target.dtype, device=target.device, seed=3
        )
        bias = drawn.masked_fill(drawn > 1, -math.inf)
    ours = attend(*inputs, case.mask, case.scale, bias=bias, dropout=dropout)
    magnitude = float(factors.max()) * rounding_magnitude(inputs, case.scale, bias)
    assert_right(ours, inputs, case.mask, case.scale, magnitude, bias, factors)
    cotangents = cotangents_of(inputs)
    gradients = by_operators(inputs, cotangents, case.mask, case.scale, bias, dropout)
    assert_gradients_right(gradients, inputs, cotangents, case.mask, case.scale, bias, factors)


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_lse_is_that_of_all_pairs(target: Target, mask: Mask):
    inputs = inputs_of(target, 66, 70)
    found = [attend(*inputs, mask, dropout=Dropout(state(target), p)).lse for p in (0.1, 0.9)]
    assert_bitwise_equal(found[0], found[1], "lse")
    exact = oracle.exact(*inputs, mask).lse
    assert_lse_close(found[0], exact, oracle.plain_lse(*inputs, mask))


def test_nothing_is_dropped_with_probability_0(target: Target):
    inputs = inputs_of(target, 66, 70)
    cotangents = cotangents_of(inputs)
    due = attend(*inputs)
    gradients = by_operators(inputs, cotangents)
    for dropout in (KEEP_ALL, Dropout(state(target), 0.0)):
        assert_bitwise_equal(attend(*inputs, dropout=dropout).out, due.out)
        found = by_operators(inputs, cotangents, dropout=dropout)
        for name, a, b in zip(found._fields, found, gradients, strict=True):
            assert_bitwise_equal(a, b, name)


def test_nothing_is_dropped_with_a_probability_that_rounds_to_0(target: Target):
    """By the kernel for dropout, whose sums may have another order."""
    inputs = inputs_of(target, 66, 70)
    cotangents = cotangents_of(inputs)
    dropout = Dropout(state(target), 1e-6)
    assert_right(attend(*inputs, dropout=dropout), inputs)
    assert_gradients_right(by_operators(inputs, cotangents, dropout=dropout), inputs, cotangents)


def test_a_row_may_lose_all_of_its_pairs(target: Target):
    """Near 1 the probability is 1 - 2^-16: nothing is kept here, but the lse has a gradient."""
    inputs = inputs_of(target, 9, 40)
    rng, p = state(target), math.nextafter(1, 0)
    assert not kept_pairs(rng, p, *shape_of(inputs)).any()
    ours = attend(*inputs, dropout=Dropout(rng, p))
    assert_bitwise_equal(ours.out, torch.zeros_like(ours.out))
    assert_bitwise_equal(ours.lse, attend(*inputs).lse, "lse")
    cotangents = cotangents_of(inputs)
    factors = factors_of(rng, p, *shape_of(inputs))
    gradients = by_operators(inputs, cotangents, dropout=Dropout(rng, p))
    assert_bitwise_equal(gradients.dv, torch.zeros_like(gradients.dv), "dv")
    assert_gradients_right(gradients, inputs, cotangents, factors=factors)


@pytest.mark.targets(**FP32)
def test_few_pairs_are_kept_and_weigh_more(target: Target):
    inputs = inputs_of(target, 66, 300)
    rng, p = state(target), 0.99
    factors = factors_of(rng, p, *shape_of(inputs))
    ours = attend(*inputs, dropout=Dropout(rng, p))
    assert_right(ours, inputs, magnitude=100 * rounding_magnitude(inputs, None), factors=factors)


@pytest.mark.targets(**FP32)
def test_the_expectation_is_what_is_not_dropped(target: Target):
    """The mean over 300 states, within 5 of its standard deviations in every element."""
    q, k, v = inputs_of(target, 7, 33)
    p, states = 0.25, 300
    due = attend(q, k, v).out.double()
    outs = torch.stack([attend(q, k, v, dropout=Dropout(state(target, seed), p)).out
                        for seed in range(states)]).double()  # fmt: skip
    weights = torch.softmax(q.double() @ k.double().mT / math.sqrt(q.shape[-1]), -1)
    deviation = (weights.square() @ v.double().square() * p / (1 - p) / states).sqrt()
    assert bool(((outs.mean(0) - due).abs() < 5 * deviation).all())
    spread = outs.var(0) / (deviation.square() * states)  # and they do scatter as they should
    assert 0.9 < float(spread.mean()) < 1.1


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_fraction_of_pairs_that_are_kept(target: Target, p: float):
    """Of 38,400 pairs: within 5 standard deviations."""
    S = 40
    shape = (2, 12, S, S)
    zeros = torch.zeros(2, 12, S, target.head_dim, dtype=target.dtype, device=target.device)
    out = attend(zeros, zeros, torch.ones_like(zeros), dropout=Dropout(state(target, 7), p)).out
    kept = float(out[..., 0].double().mean()) * (OUTCOMES - threshold_of(p)) / OUTCOMES
    assert (
        abs(kept - (1 - p))
        < 5 * math.sqrt(p * (1 - p) / math.prod(shape)) + torch.finfo(target.dtype).eps
    )


# --- errors


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_probability_out_of_range(p: float):
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match="dropout_p must be at least 0 and below 1"):
        attend(q, q, q, dropout=Dropout(torch.zeros(2, dtype=torch.int64), p))


def test_states_that_are_none():
    q = torch.ones(1, 1, 2, 4)
    for rng, text in (
        (None, "rng must be given where dropout_p is not 0"),
        (torch.zeros(2, dtype=torch.int32), "rng has the wrong dtype"),
        (torch.zeros(2), "rng has the wrong dtype"),
        (
            torch.zeros(3, dtype=torch.int64),
            r"rng must have the shape \(2\), but its shape is \(3\)",
        ),
        (torch.zeros(1, 2, dtype=torch.int64), r"rng must have the shape \(2\)"),
        (torch.zeros(4, dtype=torch.int64)[::2], "rng must be contiguous"),
    ):
        with pytest.raises(ValueError, match=text):
            attend(q, q, q, dropout=Dropout(rng, 0.5))
        lse = torch.zeros(1, 1, 2)
        with pytest.raises(ValueError, match=text):
            torch.ops.online_attention.backward(
                q, None, q, q, q, q, lse, None, 1, -1, -1, False, True, True, True, None, rng, 0.5
            )
