# SPDX-License-Identifier: BSD-3-Clause
"""A bias by the operators, for every row: boolean and added, its shapes and strides, its errors.

What a bias hides is tested in test_bias_hidden.py.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from attend import NAN, assert_right, attend, rounding_magnitude
from cases import Case, Inputs, normal
from gradients import Gradients, by_operators, cotangents_of
from gradients import assert_right as assert_gradients_right
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask
from rows import Target
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["boolean", "element", "float32"]

CASES = [
    Case("one-by-one", 1, 1),
    Case("odd", 5, 7, B=2),
    Case("tile-plus-one", 65, 67),
    Case("causal", 33, 70, mask=CAUSAL),
    Case("causal-top-left", 70, 33, mask=CAUSAL_TOP_LEFT),
    Case("window", 40, 150, mask=Mask(left=35, right=20)),
    Case("grouped", 17, 19, H=6, H_kv=2, mask=CAUSAL),
    Case("decode", 1, 131, H=4, H_kv=1),
    Case("split", 3, 1031, H=2, H_kv=1),
    Case("unequal-dims", 13, 37, D=24, D_v=40),
    Case("zero-scale", 9, 21, scale=0.0),
    Case("negative-scale", 9, 21, scale=-0.3),
    Case("scores-of-1e3", 33, 65, spread=10.0, scale=2.0),
]


def drawn(
    target: Target, kind: str, shape: tuple[int, ...], spread: float = 1.0, seed: int = 5
) -> Tensor:
    """About a sixth of its pairs hidden."""
    (x,) = normal(shape, dtype=torch.float64, device=target.device, seed=seed)
    if kind == "boolean":
        return x < 1
    dtype = target.dtype if kind == "element" else torch.float32
    return (spread * x).to(dtype).masked_fill(x >= 1, -math.inf)


def inputs_of(target: Target, S_q: int, S_kv: int, **sizes: int) -> Inputs:
    return Case("any", S_q, S_kv, **sizes).inputs(target.dtype, target.device, target.head_dim)


def check(inputs: Inputs, bias: Tensor, mask: Mask = FULL, scale: float | None = None) -> None:
    ours = attend(*inputs, mask, scale, bias=bias)
    assert_right(ours, inputs, mask, scale, rounding_magnitude(inputs, scale, bias), bias)
    cotangents = cotangents_of(inputs)
    gradients = by_operators(inputs, cotangents, mask, scale, bias)
    assert_gradients_right(gradients, inputs, cotangents, mask, scale, bias)


def results(inputs: Inputs, bias: Tensor, mask: Mask = FULL) -> tuple[Tensor, ...]:
    out, lse = attend(*inputs, mask, deterministic=True, bias=bias)
    return out, lse, *by_operators(inputs, cotangents_of(inputs), mask, bias=bias)


def assert_same(ours: tuple[Tensor, ...], due: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("out", "lse", *Gradients._fields), ours, due, strict=True):
        assert_bitwise_equal(a, b, name)


# --- results


@pytest.mark.small
@pytest.mark.cases(CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_out_and_gradients(target: Target, case: Case, kind: str):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    bias = drawn(target, kind, (case.B, case.H, case.S_q, case.S_kv))
    check(inputs, bias, case.mask, case.scale)


@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_large_biases(target: Target, spread: float):
    inputs = inputs_of(target, 33, 70)
    check(inputs, drawn(target, "element", (1, 2, 33, 70), spread))


def test_padding(target: Target):
    """Whole tiles of keys are hidden, from some batch elements only."""
    inputs = inputs_of(target, 19, 300, B=3)
    lengths = torch.tensor([1, 130, 300], device=target.device)
    shown = torch.arange(300, device=target.device) < lengths[:, None]
    check(inputs, shown[:, None, None])


def test_documents(target: Target):
    """Queries see the keys of their own document: blocks on the diagonal."""
    inputs = inputs_of(target, 97, 97)
    document = torch.arange(97, device=target.device) // 29
    check(inputs, (document[:, None] == document)[None, None], CAUSAL)


def test_boolean_and_infinite_biases_hide_the_same(target: Target):
    inputs = inputs_of(target, 33, 70)
    shown = drawn(target, "boolean", (1, 2, 33, 70))
    due = attend(*inputs, bias=shown)
    for dtype in {target.dtype, torch.float32}:
        added = torch.zeros(shown.shape, dtype=dtype, device=target.device)
        ours = attend(*inputs, bias=added.masked_fill(~shown, -math.inf))
        eps = torch.finfo(target.dtype).eps
        torch.testing.assert_close(ours.out, due.out, rtol=8 * eps, atol=8 * eps)
        torch.testing.assert_close(ours.lse, due.lse, rtol=1e-5, atol=1e-5)


# --- shapes and strides: read as the full bias would be, bit for bit


@pytest.mark.parametrize("kind", KINDS)
def test_broadcast_dimensions(target: Target, kind: str):
    full = (2, 4, 13, 37)
    inputs = inputs_of(target, 13, 37, B=2, H=4, H_kv=2)
    for sizes in itertools.product(*((1, n) for n in full)):
        bias = drawn(target, kind, sizes)
        due = results(inputs, bias.expand(full).contiguous())
        assert_same(results(inputs, bias), due)
        assert_same(results(inputs, bias.expand(full)), due)  # stride 0 in a size above 1


@pytest.mark.parametrize("kind", KINDS)
def test_strides(target: Target, kind: str):
    B, H, S_q, S_kv = full = (2, 2, 35, 67)
    inputs = inputs_of(target, S_q, S_kv, B=B)
    bias = drawn(target, kind, full)
    due = results(inputs, bias)
    wide = torch.zeros(B, H, S_q, 2 * S_kv + 3, dtype=bias.dtype, device=bias.device)
    wide[..., 1 : 2 * S_kv : 2] = bias
    rows = torch.zeros(B + 1, H, 2 * S_q, S_kv + 1, dtype=bias.dtype, device=bias.device)
    rows[1:, :, ::2, 1:] = bias
    for view in (
        bias.mT.contiguous().mT,
        bias.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        bias.transpose(1, 2).contiguous().transpose(1, 2),
        wide[..., 1 : 2 * S_kv : 2],
        rows[1:, :, ::2, 1:],
    ):
        assert torch.equal(view, bias)
        assert not view.is_contiguous()
        assert_same(results(inputs, view), due)


def test_the_bias_is_left_as_it_was_and_nothing_beside_it_is_read(target: Target):
    inputs = inputs_of(target, 35, 67)
    bias = drawn(target, "element", (1, 2, 35, 67))
    room = torch.full((1, 3, 37, 200), NAN, dtype=bias.dtype, device=bias.device)
    view = room[:, :2, 1:36, 3:70]
    view.copy_(bias)
    assert_same(results(inputs, view, CAUSAL), results(inputs, bias, CAUSAL))
    assert torch.equal(view, bias)


def test_empty_problems(target: Target):
    for S_q, S_kv in ((3, 0), (0, 3)):
        inputs = inputs_of(target, S_q, S_kv)
        for bias in (drawn(target, "boolean", (1, 2, S_q, S_kv)),
                     drawn(target, "element", (1, 1, 1, S_kv))):  # fmt: skip
            out, lse, *gradients = results(inputs, bias)
            assert_bitwise_equal(out, torch.zeros_like(out))
            assert bool((lse == -math.inf).all())
            assert not any(bool(x.any()) for x in gradients)


# --- errors


def test_biases_that_are_none():
    q, k = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 5, 8)
    lse = torch.ones(2, 3, 4)
    operators = torch.ops.online_attention
    for bias, text in (
        (torch.ones(4, 5), r"bias must have 4 dimensions \(B, H, S_q, S_kv\), but its shape is"),
        (torch.ones(2, 3, 4, 4), r"bias must have sizes that are 1 or those of \(B, H, S_q, S_kv\) "
                                 r"= \(2, 3, 4, 5\), but its shape is \(2, 3, 4, 4\)"),
        (torch.ones(2, 3, 4, 0), "bias must have sizes that are 1 or those of"),
        (torch.ones(1, 1, 1, 1).double(), "bias must be boolean, of the dtype of q, or float32"),
        (torch.ones(1, 1, 1, 1).half(), "bias must be boolean, of the dtype of q, or float32"),
        (torch.ones(1, 1, 1, 1).int(), "bias must be boolean, of the dtype of q, or float32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            attend(q, k, k, bias=bias)
        with pytest.raises(ValueError, match=text):
            operators.backward(
                q, None, q, k, k, q, lse, None, 1, -1, -1, False, True, True, True, bias
            )


@pytest.mark.targets(device="cuda")
def test_bias_on_another_device(target: Target):
    q, k, v = inputs_of(target, 3, 5)
    with pytest.raises(ValueError, match="bias must be on the device of q"):
        attend(q, k, v, bias=torch.ones(1, 1, 1, 1, dtype=torch.bool))
