# SPDX-License-Identifier: BSD-3-Clause
"""The log-sum-exp: natural log, fp32 (fp64 for fp64), and exactly what merging needs."""

from __future__ import annotations

import math

import pytest
import torch

import oracle
from attend import attend
from cases import FULL_CASES, SMALL, Case, normal
from oracle import CAUSAL, FULL, Mask
from rows import Target
from tolerance import assert_bitwise_equal, assert_lse_close


@pytest.mark.cases([*SMALL, *FULL_CASES[-6:]])
def test_within_a_few_ulps(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    ours = attend(*inputs, case.mask, case.scale).lse
    exact = oracle.exact(*inputs, case.mask, case.scale).lse
    assert_lse_close(ours, exact, oracle.plain_lse(*inputs, case.mask, case.scale))


@pytest.mark.parametrize("S_kv", [1, 2, 63, 64, 65, 129, 3001])
def test_equal_scores_count_the_keys(target: Target, S_kv: int):
    """Every score 0: the lse of a row that sees n keys is log n."""
    q, k, v = Case("zeros", 3, S_kv).inputs(target.dtype, target.device, target.head_dim)
    for mask in (FULL, CAUSAL, Mask(left=40, right=0)):
        lse = attend(torch.zeros_like(q), k, v, mask).lse
        seen = mask.visible(3, S_kv).sum(-1).to(device=lse.device, dtype=torch.float64)
        due = seen.log().expand_as(lse)
        assert_lse_close(lse, due, due.to(lse.dtype))


@pytest.mark.parametrize("score", [-3e4, -1e4, -1.5, 0.25, 1e4, 3e4])
def test_one_key_gives_its_own_score(target: Target, score: float):
    D = target.head_dim
    q = torch.zeros(1, 2, 3, D, dtype=target.dtype, device=target.device)
    k, v = q[:, :, :1].clone(), q[:, :, :1].clone()
    q[..., 0], k[..., 0] = 1, score  # representable in bf16 or rounded alike in both
    lse = attend(q, k, v, scale=1.0).lse
    due = k[..., 0].double().expand_as(lse)
    assert_lse_close(lse, due, due.to(lse.dtype))


@pytest.mark.targets(dtypes=(torch.float16, torch.bfloat16))
def test_half_types_keep_single_precision_in_the_lse(target: Target):
    """The scores of half inputs are sums of exact products: nothing is rounded to half."""
    inputs = Case("half", 33, 129).inputs(target.dtype, target.device, target.head_dim)
    lse = attend(*inputs).lse
    exact = oracle.exact(*inputs).lse
    assert float((lse.double() - exact).abs().max()) < 1e-5


def test_lse_is_the_same_with_and_without_values(target: Target):
    """It depends on scores alone: neither on what v holds nor on how wide it is."""
    D = target.head_dim
    q, k, v, narrow = normal((2, 2, 37, D), (2, 2, 67, D), (2, 2, 67, D), (2, 2, 67, 1),
                             dtype=target.dtype, device=target.device)  # fmt: skip
    due = attend(q, k, v, CAUSAL).lse
    assert_bitwise_equal(attend(q, k, torch.full_like(v, math.nan), CAUSAL).lse, due)
    if target.takes(D, 1):
        assert_bitwise_equal(attend(q, k, narrow, CAUSAL).lse, due)


def test_row_without_a_key_is_minus_infinity(target: Target):
    inputs = Case("blind", 9, 4).inputs(target.dtype, target.device, target.head_dim)
    lse = attend(*inputs, CAUSAL).lse
    assert (lse[:, :, :5] == -math.inf).all()
    assert lse[:, :, 5:].isfinite().all()
