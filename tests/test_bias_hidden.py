# SPDX-License-Identifier: BSD-3-Clause
"""What a bias hides does not exist: rows that see nothing, and NaN or Inf in what is hidden."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attend import NAN, attend
from cases import Inputs
from gradients import Cotangents, Gradients, by_operators, cotangents_of
from oracle import CAUSAL, FULL, Mask
from rows import Target
from test_bias import KINDS, drawn, inputs_of, results
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")

POISONS = [NAN, math.inf, -math.inf]
S_Q, S_KV = 66, 150


def hide(bias: Tensor, pairs: Tensor) -> Tensor:
    return bias.masked_fill(pairs, False if bias.dtype == torch.bool else -math.inf)


def shown_by(bias: Tensor, mask: Mask) -> Tensor:
    """(H, S_q, S_kv), of one batch element."""
    shown = bias if bias.dtype == torch.bool else bias != -math.inf
    return shown[0] & mask.visible(S_Q, S_KV).to(bias.device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_rows_that_see_nothing_are_empty(target: Target, mask: Mask, kind: str):
    inputs = inputs_of(target, S_Q, S_KV)
    bias = drawn(target, kind, (1, 2, S_Q, S_KV))
    empty = torch.zeros(2, S_Q, dtype=torch.bool, device=target.device)
    empty[0, 3:17], empty[1, 50], empty[1, 65] = True, True, True
    bias = hide(bias, empty[None, :, :, None])
    out, lse, dq, dk, dv = results(inputs, bias, mask)
    assert_bitwise_equal(out[0][empty], torch.zeros_like(out[0][empty]))
    assert bool((lse[0][empty] == -math.inf).all())
    assert bool(lse[0][~empty].isfinite().all())
    assert not bool(dq[0][empty].any())
    assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_seen_at_all(target: Target, kind: str):
    inputs = inputs_of(target, 5, 70)
    bias = drawn(target, kind, (1, 1, 1, 1))
    out, lse, *gradients = results(inputs, hide(bias, torch.ones_like(bias, dtype=torch.bool)))
    assert_bitwise_equal(out, torch.zeros_like(out))
    assert bool((lse == -math.inf).all())
    assert not any(bool(x.any()) for x in gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_poisoned_keys_and_values_reach_only_who_sees_them(target: Target, mask: Mask, kind: str):
    """Keys that no row sees, and keys that some do: the others keep every bit."""
    q, k, v = inputs_of(target, S_Q, S_KV)
    keys = [0, 37, 64, 149]
    gone = torch.zeros(S_Q, S_KV, dtype=torch.bool, device=target.device)
    gone[:, [37, 149]] = True  # from all rows
    bias = hide(drawn(target, kind, (1, 2, S_Q, S_KV)), gone)
    see = shown_by(bias, mask)[..., keys].any(-1)  # (H, S_q)
    cotangents = cotangents_of(Inputs(q, k, v))
    clean = attend(q, k, v, mask, bias=bias)
    clean_dq = by_operators(Inputs(q, k, v), cotangents, mask, bias=bias).dq
    for poison in POISONS:
        for which in ("k", "v"):
            bad = Inputs(q, k.clone(), v.clone())
            getattr(bad, which)[:, :, keys] = poison
            ours = attend(*bad, mask, bias=bias)
            assert_bitwise_equal(ours.out[0][~see], clean.out[0][~see])
            assert_bitwise_equal(ours.lse[0][~see], clean.lse[0][~see], "lse")
            dq, dk, dv = by_operators(bad, cotangents, mask, bias=bias)
            assert_bitwise_equal(dq[0][~see], clean_dq[0][~see], "dq")
            for name, x in (("dk", dk), ("dv", dv)):
                assert not bool(x[:, :, [37, 149]].any()), f"{name} of keys that nobody sees"
            if poison != poison:
                assert bool(ours.out[0][see].isnan().all())
                assert bool(dq[0][see].isnan().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["q", "dout"])
def test_poisoned_rows_reach_only_the_keys_they_see(target: Target, which: str, kind: str):
    inputs = inputs_of(target, S_Q, S_KV)
    rows = [1, 40, 65]
    bias = drawn(target, kind, (1, 2, S_Q, S_KV))
    keys = torch.arange(S_KV, device=target.device) % 3 == 0
    for row in rows:
        bias[:, :, row] = hide(bias[:, :, row], keys)
    seen = shown_by(bias, FULL)[:, rows].any(1)  # (H, S_kv)
    clean_cotangents = cotangents_of(inputs)
    clean = by_operators(inputs, clean_cotangents, bias=bias)
    others = torch.ones(S_Q, dtype=torch.bool, device=target.device)
    others[rows] = False
    for poison in POISONS:
        q, dout = inputs.q.clone(), clean_cotangents.dout.clone()
        (q if which == "q" else dout)[:, :, rows] = poison
        ours = by_operators(
            inputs._replace(q=q), Cotangents(dout, clean_cotangents.dlse), bias=bias
        )
        assert_bitwise_equal(ours.dq[:, :, others], clean.dq[:, :, others], "dq")
        for name in ("dk", "dv"):
            mine, due = getattr(ours, name)[0], getattr(clean, name)[0]
            assert_bitwise_equal(mine[~seen], due[~seen], name)
        poisoned: Gradients = ours
        assert bool((~poisoned.dk[0][seen].isfinite()).any(-1).all())


def test_single_nan_pairs_of_a_bias_stay_in_their_rows(target: Target):
    inputs = inputs_of(target, S_Q, S_KV)
    bias = drawn(target, "element", (1, 2, S_Q, S_KV))
    clean = attend(*inputs, bias=bias)
    for poison in (NAN, math.inf):
        bad = bias.clone()
        bad[0, 1, 40, 77] = poison
        ours = attend(*inputs, bias=bad)
        hit = torch.zeros(2, S_Q, dtype=torch.bool, device=target.device)
        hit[1, 40] = True
        assert bool(ours.out[0][hit].isnan().all())
        assert_bitwise_equal(ours.out[0][~hit], clean.out[0][~hit])
        assert_bitwise_equal(ours.lse[0][~hit], clean.lse[0][~hit], "lse")


@pytest.mark.parametrize("kind", ["element", "float32"])
def test_smallest_number_as_a_bias(target: Target, kind: str):
    """Beside others it weighs nothing; where a row has nothing else, it weighs all alike."""
    if kind == "element" and target.dtype == torch.float16:
        pytest.skip("in float16 the smallest number leaves scores their differences")
    q, k, v = inputs_of(target, S_Q, S_KV)
    dtype = target.dtype if kind == "element" else torch.float32
    smallest = torch.finfo(dtype).min
    bias = torch.zeros(1, 1, S_Q, S_KV, dtype=dtype, device=target.device)
    bias[..., 40:] = smallest
    bias[:, :, 7] = smallest
    out, lse, dq, dk, dv = results(Inputs(q, k, v), bias)
    others = torch.arange(S_Q, device=target.device) != 7
    due = attend(q, k, v, bias=bias != smallest).out
    eps = torch.finfo(target.dtype).eps
    torch.testing.assert_close(out[:, :, others], due[:, :, others], rtol=16 * eps, atol=16 * eps)
    mean = v.double().mean(2)
    torch.testing.assert_close(out[:, :, 7].double(), mean, rtol=16 * eps, atol=16 * eps)
    assert bool((lse[:, :, 7] < -1e38).all())
    assert all(bool(x.isfinite().all()) for x in (dq, dk, dv))
