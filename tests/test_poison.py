# SPDX-License-Identifier: BSD-3-Clause
"""What is hidden does not exist: NaN and Inf in it never arrive; what is visible always does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from attend import NAN, assert_right, attend
from cases import Case, Inputs
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask
from rows import Target
from tolerance import assert_bitwise_equal

POISONS = [NAN, math.inf, -math.inf]
MASKS = {
    "causal": CAUSAL,
    "causal-top-left": CAUSAL_TOP_LEFT,
    "window": Mask(left=20, right=3),
    "window-of-one": Mask(left=0, right=0),
    "right-bound": Mask(left=-1, right=11),
}


def inputs_of(target: Target, S_q: int, S_kv: int, **sizes: int) -> Inputs:
    return Case("poison", S_q, S_kv, **sizes).inputs(target.dtype, target.device, target.head_dim)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("key", [0, 15, 16, 38, 63, 64, 69])
def test_poisoned_key_changes_exactly_the_rows_that_see_it(target: Target, mask: Mask, key: int):
    """Inside a diagonal tile, at its edges, at the ends: other rows keep every bit."""
    q, k, v = inputs_of(target, 66, 70)
    due = attend(q, k, v, mask)
    sees = mask.visible(66, 70)[:, key].to(target.device)
    for poison in POISONS:
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, key], bad_v[:, :, key] = poison, poison
        ours = attend(q, bad_k, bad_v, mask)
        assert_bitwise_equal(ours.out[:, :, ~sees], due.out[:, :, ~sees])
        assert_bitwise_equal(ours.lse[:, :, ~sees], due.lse[:, :, ~sees], "lse")
        exact = oracle.exact(q, bad_k, bad_v, mask)
        assert torch.equal(ours.out.isnan(), exact.out.isnan())
        assert torch.equal(ours.lse.isnan(), exact.lse.isnan())


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_visible_nan_key_makes_all_of_its_rows_nan(target: Target, mask: Mask):
    q, k, v = inputs_of(target, 66, 70)
    k[:, :, 33, 0] = NAN
    ours = attend(q, k, v, mask)
    sees = mask.visible(66, 70)[:, 33].to(target.device)
    assert ours.out[:, :, sees].isnan().all()
    assert ours.lse[:, :, sees].isnan().all()
    assert not ours.out[:, :, ~sees].isnan().any()
    assert not ours.lse[:, :, ~sees].isnan().any()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_visible_nan_value_reaches_its_own_column_alone(target: Target, mask: Mask):
    q, k, v = inputs_of(target, 66, 70)
    due = attend(q, k, v, mask)
    v[:, :, 33, 1] = NAN
    ours = attend(q, k, v, mask)
    hit = torch.zeros_like(ours.out, dtype=torch.bool)
    hit[:, :, mask.visible(66, 70)[:, 33].to(target.device), 1] = True
    assert torch.equal(ours.out.isnan(), hit)
    assert_bitwise_equal(ours.out[~hit], due.out[~hit])
    assert_bitwise_equal(ours.lse, due.lse, "lse")


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_nan_query_stays_in_its_own_row(target: Target, mask: Mask):
    q, k, v = inputs_of(target, 70, 66)
    due = attend(q, k, v, mask)
    q[:, :, [1, 40], 0] = NAN  # under the causal mask query 1 sees no key
    ours = attend(q, k, v, mask)
    hit = torch.zeros_like(ours.lse, dtype=torch.bool)
    hit[:, :, 40] = True
    hit[:, :, 1] = mask.is_full
    assert torch.equal(ours.lse.isnan(), hit)
    assert torch.equal(ours.out.isnan(), hit[..., None].expand_as(ours.out))
    assert_bitwise_equal(ours.out[~hit], due.out[~hit])


@pytest.mark.parametrize("poison", [math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_infinities_follow_ieee_arithmetic(target: Target, poison: float, which: str, mask: Mask):
    """A score of +inf makes its row NaN as softmax does, one of -inf is a weight of 0."""
    inputs = inputs_of(target, 37, 70)
    getattr(inputs, which)[:, :, 30, 2 % target.head_dim] = poison
    assert_right(attend(*inputs, mask), inputs, mask)


def test_row_whose_every_visible_score_is_minus_infinite_is_empty(target: Target):
    q, k, v = inputs_of(target, 5, 70)
    q[:], k[:] = 0, 0
    q[..., 0], k[..., 0] = 1, -math.inf
    ours = attend(q, k, v)
    assert_bitwise_equal(ours.out, torch.zeros_like(ours.out))
    assert (ours.lse == -math.inf).all()


# --- memory that belongs to nobody


def inside_nan(x: Tensor) -> Tensor:
    """A copy of `x` narrowed out of a buffer that is NaN before, after and between its parts."""
    B, H, S, D = x.shape
    room = torch.full((B + 2, H + 1, S + 130, D + 24), NAN, dtype=x.dtype, device=x.device)
    view = room.narrow(0, 1, B).narrow(1, 0, H).narrow(2, 0, S).narrow(3, 0, D)
    view.copy_(x)
    return view


@pytest.mark.small
def test_memory_behind_odd_lengths_is_never_used(target: Target):
    inputs = inputs_of(target, 15, 67, D_v=target.head_dim - 1)
    due = attend(*inputs, CAUSAL)
    assert_bitwise_equal(attend(*(inside_nan(x) for x in inputs), CAUSAL).out, due.out)


@pytest.mark.parametrize("D_v", [0, -1])
@pytest.mark.parametrize("S_q", [1, 15, 64, 65])
@pytest.mark.parametrize("S_kv", [1, 31, 64, 67, 130])
def test_memory_behind_every_length_is_never_used(target: Target, S_q: int, S_kv: int, D_v: int):
    inputs = inputs_of(target, S_q, S_kv, D_v=target.head_dim + D_v)
    for mask in (FULL, CAUSAL):
        due = attend(*inputs, mask)
        ours = attend(*(inside_nan(x) for x in inputs), mask)
        assert_bitwise_equal(ours.out, due.out)
        assert_bitwise_equal(ours.lse, due.lse, "lse")


def test_memory_behind_the_keys_of_a_split_is_never_used(target: Target):
    inputs = inputs_of(target, 2, 3001, H=2, H_kv=1)
    due = attend(*inputs, CAUSAL)
    ours = attend(*(inside_nan(x) for x in inputs), CAUSAL)
    assert_bitwise_equal(ours.out, due.out)
    assert_bitwise_equal(ours.lse, due.lse, "lse")


def test_poisoned_key_of_a_split_stays_hidden(target: Target):
    q, k, v = inputs_of(target, 3, 3001, H=1)
    mask = Mask(left=1500, right=0)
    due = attend(q, k, v, mask)
    k[:, :, :1490], v[:, :, :1490] = NAN, NAN
    k[:, :, -1], v[:, :, -1] = NAN, NAN  # the last query alone sees it
    ours = attend(q, k, v, mask)
    assert_bitwise_equal(ours.out[:, :, :2], due.out[:, :, :2])
    assert ours.out[:, :, 2].isnan().all()


def test_first_head_does_not_leak_into_the_next(target: Target):
    q, k, v = inputs_of(target, 33, 67, B=2, H=4, H_kv=2)
    due = attend(q, k, v, CAUSAL)
    q[0, 0], k[0, 0], v[0, 0] = NAN, NAN, NAN
    ours = attend(q, k, v, CAUSAL)
    assert ours.out[0, :2].isnan().all()  # the group of kv head 0
    assert_bitwise_equal(ours.out[0, 2:], due.out[0, 2:])
    assert_bitwise_equal(ours.out[1], due.out[1])


@pytest.mark.usefixtures("deterministic_mode")
@pytest.mark.parametrize("name", ["causal-more-queries", "no-keys", "decode", "window"])
def test_every_element_of_the_outputs_is_written(target: Target, name: str):
    """In this mode torch fills new tensors with NaN, workspaces too."""
    from cases import SMALL

    case = next(case for case in SMALL if case.name == name)
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    assert_right(attend(*inputs, case.mask, case.scale), inputs, case.mask, case.scale)
